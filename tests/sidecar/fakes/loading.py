import logging

import scenario

config, directory, reporter = scenario.start("loading")
reporter.phase("converting", 0.5)
logging.info("converting")
print("a line that is not the model directory")
print(directory)
