"""For all tests: nothing leaves this machine."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a model comes from the local cache or the test fails at once
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when ray is imported: nodes have loopback addresses
