"""Tests that need heavy packages: ``make test-integrations`` installs them, and what is missing is a failure here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the other tests' oracle
os.environ["HF_HUB_OFFLINE"] = "1"

from transformers.utils import is_torchvision_available  # noqa: E402: after the setting

is_torchvision_available()  # it remembers: what stands in for torchvision in Avalanche's tests must not count
