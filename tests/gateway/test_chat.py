from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from radix_backend.errors import InvalidArgument
from radix_backend.gateway.chat import ChatTemplate
from tests.gateway.small_models import byte_level, write_model

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """\
{%- if strict is defined and tools is not none %}
    {{- raise_exception("no tools") }}
{%- endif %}
{{- bos_token }}
{% for message in messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
        + message['content'] | trim + '<|eot_id|>' %}
    {{- content }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}"""
QWEN_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{ tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{% set ns.last = (messages|length - 1) - loop.index0 %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- if loop.index0 == ns.last %}{{- '(last)' }}{% endif %}
    {%- for call in message.tool_calls or [] %}{{ call | tojson(indent=2) }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think></think>' }}{% endif %}
{%- endif %}"""

SHORT = [{"role": "user", "content": "Hi <b>&</b> 你好"}]
TALK = [
    *SHORT,
    {"role": "assistant", "content": "Hello.\n", "tool_calls": [{"name": "f", "arguments": {"x": "<ö>", "a": 1}}]},
    {"role": "user", "content": " And?  "},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": "<&>"}}}]


def model(directory: Path, template: object, **entries: object) -> Path:
    write_model(directory, byte_level())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": {"content": "<eos>", "__type": "AddedToken", "special": True},
        "chat_template": template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config | entries))
    return directory


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("template", "messages", "variables"),
    [
        (SMOLLM2, SHORT, {}),
        (SMOLLM2, [{"role": "system", "content": "Be brief."}, *TALK], {}),
        (LLAMA3, TALK, {"strict": True}),
        (MISTRAL, TALK, {}),
        (QWEN_TOOLS, TALK, {"tools": TOOLS}),
        (QWEN_TOOLS, SHORT, {"enable_thinking": False}),
    ],
    ids=["smollm2", "smollm2-system", "llama3", "mistral", "qwen-tools", "qwen-variables"],
)
def test_renders_as_transformers_does(
    tmp_path: Path,
    template: str,
    messages: list[dict[str, Any]],
    variables: dict[str, Any],
    add_generation_prompt: bool,
) -> None:
    transformers = pytest.importorskip("transformers")
    directory = model(tmp_path, template)
    reference = transformers.AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
    )
    assert ChatTemplate(directory).render(messages, add_generation_prompt, variables) == reference


def test_a_template_file_beats_the_tokenizer_config(tmp_path: Path) -> None:
    directory = model(tmp_path, "from config")
    (directory / "chat_template.jinja").write_text("from file")
    assert ChatTemplate(directory).render(SHORT) == "from file"


def test_named_templates_are_chosen_by_what_is_asked(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    chat = ChatTemplate(model(tmp_path / "both", named))
    assert chat.render(SHORT) == "plain"
    assert chat.render(SHORT, variables={"tools": TOOLS}) == "tools"
    with pytest.raises(InvalidArgument, match="no default chat template, only: tool_use"):
        ChatTemplate(model(tmp_path / "one", named[1:])).render(SHORT)


def test_special_tokens_of_older_checkpoints_are_found(tmp_path: Path) -> None:
    directory = model(tmp_path, "{{ bos_token }}|{{ unk_token }}", bos_token=None)
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "unk_token": {"content": "?"}}))
    assert ChatTemplate(directory).render(SHORT) == "<s>|?"


def test_dates_are_todays(tmp_path: Path) -> None:
    text = ChatTemplate(model(tmp_path, "{{ strftime_now('%Y') }}")).render(SHORT)
    assert len(text) == 4
    assert text.isdigit()


@pytest.mark.parametrize(
    ("template", "messages", "complaint"),
    [
        (None, SHORT, "the model has no chat template"),
        (MISTRAL, [*SHORT, *SHORT], "roles must alternate"),
        (SMOLLM2, [], "'messages' is empty"),
        (
            SMOLLM2,
            [{"content": "who?"}],
            "holds {'content': 'who\\?'}; accepted: objects with a string 'role'",
        ),
        (SMOLLM2, [{"role": "user"}], "does not accept 'messages'"),
        (SMOLLM2, [{"role": "user", "content": None}], "does not accept 'messages'"),
        ("{% for %}", SHORT, "template 'default' is broken"),
        ("{{ messages.__class__.__mro__ }}", SHORT, "does not accept 'messages'"),
        ("{{ messages.append(1) }}", SHORT, "does not accept 'messages'"),
    ],
)
def test_what_cannot_be_rendered_is_an_invalid_argument(
    tmp_path: Path, template: object, messages: list[dict[str, Any]], complaint: str
) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        ChatTemplate(model(tmp_path, template)).render(messages)


def test_variables_cannot_replace_the_conversation(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="'messages' is already taken"):
        ChatTemplate(model(tmp_path, SMOLLM2)).render(SHORT, variables={"messages": []})


@pytest.mark.model
def test_the_embedded_models_template_renders_a_conversation(embedded_model_dir: Path) -> None:
    text = ChatTemplate(embedded_model_dir).render(SHORT)
    assert text.endswith("<|im_start|>user\nHi <b>&</b> 你好<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\n")
