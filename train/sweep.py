"""Many runs from one command: Hydra's sweeper makes the points, each is the run that the same command would make alone.

Every point is a process of its own, so that it may start ranks, fail or be killed without touching the others.
"""

from __future__ import annotations

import functools
import json
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from ..conf.compose import CONFIG_ROOT, ROOTS, compose, forced, parse_override
from ..errors import ConfigError, UserError, one_line
from .folder import run_folder
