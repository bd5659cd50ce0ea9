"""What the package takes from train_lora_single.py, so that it measures as the trainer trained.

This is the only module that imports the script. It takes the file beside the package by its path,
since the working folder may hold another copy. The script itself knows nothing of the package.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

from inspect_lora.common import InspectError

NAME = "train_lora_single"
SCRIPT = Path(__file__).resolve().parent.parent / f"{NAME}.py"


def load_script() -> ModuleType:
    """Return the script as a module; what is measured twice must come from one module."""
    known = sys.modules.get(NAME)
    if known is not None and Path(known.__file__ or "").resolve() == SCRIPT:
        return known
    if not SCRIPT.is_file():
        raise InspectError(
            f"{SCRIPT} is missing. The folder inspect_lora must lie beside {NAME}.py, since what "
            "is measured is rendered and computed as that script does it."
        )
    spec = importlib.util.spec_from_file_location(NAME, SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module  # a dataclass looks its own module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[NAME]
        raise
    return module


script = load_script()
# transformers advises packages for GPUs with each model; the script says where they help.
logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)

UserError = script.UserError
Example = script.Example
Problem = script.Problem
ChatFormat = script.ChatFormat

read_conversations = script.read_conversations
entries_of = script.entries_of
Job = script.Job
read_both_files = script.read_both_files
held_out_percent = script.held_out_percent
problems_as_text = script.problems_as_text
check_messages = script.check_messages
commit_of = script.commit_of
load_config = script.load_config
load_chat_format = script.load_chat_format
load_model = script.load_model
is_out_of_memory = script.is_out_of_memory
choose_delta_kernels = script.choose_delta_kernels
prepare_device = script.prepare_device
use_fp16_matmul = script.use_fp16_matmul
TESTED_IN_FP16 = script.TESTED_IN_FP16
encode = script.encode
TEMPLATE_ERRORS = script.TEMPLATE_ERRORS
pad = script.pad
reply_logits = script.reply_logits
example_losses = script.example_losses
is_multimodal = script.is_multimodal
name_in_multimodal_model = script.name_in_multimodal_model
check_names_for_vllm = script.check_names_for_vllm
why_vllm_refuses = script.why_vllm_refuses
vllm_command = script.vllm_command
name_on_server = script.name_on_server
script_sha256 = script.script_sha256
FILES_THAT_COUNT = script.FILES_THAT_COUNT
file_fingerprints = script.file_fingerprints
