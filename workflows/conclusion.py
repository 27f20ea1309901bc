"""How a stage ends: with a verdict that is shown, and an exit status that follows from it."""

from typing import Any

from stas_core import storage
from stas_core.verdicts import DO_NOT_USE, Verdict, VerdictConfig
from workflows.out_folder import MANIFEST


def conclude(verdict: Verdict, *, accept_warnings: bool) -> int:
    """Print a verdict; return the exit status: 1 where the result is not to be used and nobody accepted that."""
    for line in verdict.lines:
        print(line, flush=True)
    if verdict.level != DO_NOT_USE:
        return 0
    if accept_warnings:
        print("  accepted (accept_warnings=true): exit status 0", flush=True)
        return 0
    print("  exit status 1; outputs are kept. accept_warnings=true goes on all the same", flush=True)
    return 1


def recorded(verdict: Verdict, limits: VerdictConfig) -> dict[str, Any]:
    """Return a verdict as a fact of the manifest, with the limits that it goes by."""
    return {"verdict": verdict.to_json() | {"limits": limits.model_dump(mode="json")}}


def is_judged(out: str, limits: VerdictConfig) -> bool:
    """Tell whether the verdict of a finished run goes by these limits."""
    found = _manifest(out).get("verdict")
    return isinstance(found, dict) and found.get("limits") == limits.model_dump(mode="json")


def conclude_again(out: str, *, accept_warnings: bool) -> int:
    """Print the verdict of a finished run, and return its exit status; a run from before there were any has none."""
    verdict = verdict_of(out)
    return 0 if verdict is None else conclude(verdict, accept_warnings=accept_warnings)


def verdict_of(out: str) -> Verdict | None:
    """Return the verdict in a folder's manifest; None: there is none."""
    return Verdict.from_json(_manifest(out).get("verdict"))


def _manifest(out: str) -> dict[str, Any]:
    uri = storage.join(out, MANIFEST)
    found = storage.read_json(uri) if storage.exists(uri) else {}
    return found if isinstance(found, dict) else {}
