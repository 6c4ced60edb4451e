"""What a person reads after Ctrl-C: how to go on, and what that costs. No torch."""

from pathlib import Path

from drencoder.errors import DrencoderError
from drencoder.privacy.ledger import Ledger
from drencoder.reading import printable
from drencoder.runs.run_folder import RunFolder
from drencoder.runs.tensor_files import read_tensors


def resume_hint(command: str, path: Path) -> str:
    """Returns how to go on with `drencoder <command>` after an interruption, and what was lost: nothing only where that is so.

    A slot that was charged and whose result is in no checkpoint is lost. Under central trust it is charged again; under the
    others it is left out, so that no client releases twice.
    """
    folder, resume = RunFolder(path), f"drencoder {command} --resume {printable(path)}"
    if not folder.ledger.exists():
        return "\nInterrupted before the run began: nothing was asked or charged. Start the same command again."
    try:
        done = _last_slot(folder)
        with Ledger.open(folder.ledger, read_only=True) as ledger:
            open_slots = [slot for slot in ledger.charges() if slot > done]
            rule = ledger.resume_rule(max(open_slots)) if open_slots else "run"
            plan = ledger.plan
    except DrencoderError:  # resuming says more about it
        return f"\nInterrupted. Go on with: {resume}"
    if not open_slots or plan.noise == "replay":
        return f"\nInterrupted. Nothing is lost: {resume}"
    what = f"round {max(open_slots)}" if max(open_slots) else "stage 1"
    if what == "stage 1" and "stage1" in plan.non_private:
        return "\nInterrupted. Stage 1's real gradients were charged and are lost, so this run cannot go on: start a new one."
    if rule == "redo":
        return f"\nInterrupted. The charge of {what} is lost: {resume} goes on, and charges it again as far as the budget allows."
    return f"\nInterrupted. {what[0].upper()}{what[1:]} is lost: its charge stays, and {resume} goes on with what comes after it."


def _last_slot(folder: RunFolder) -> int:
    """The last slot whose result is in the checkpoint; -1 without one."""
    checkpoint = folder.checkpoints / "latest.safetensors"
    slot = read_tensors(checkpoint)[1].get("slot") if checkpoint.exists() else -1
    return slot if isinstance(slot, int) else -1
