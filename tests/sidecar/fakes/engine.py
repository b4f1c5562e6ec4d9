import logging
import signal
import time

import scenario

config, directory, reporter = scenario.start("engine")
if (directory / "engine-ignores-sigterm").exists():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
reporter.phase("loading weights", 0.4)
while (directory / "engine-loads").exists():
    time.sleep(0.05)
logging.warning("the engine serves")
reporter.ready()
while True:
    time.sleep(0.05)
    if not (directory / "engine-hangs").exists():
        reporter.progress()
