"""Tiny random models of all families that transformers has for causal language models, each through every verb.

    python benchmarks/architectures.py --output runs/architectures                  # all families, an hour or more
    python benchmarks/architectures.py --output runs/architectures --families llama mamba2
    python benchmarks/architectures.py --output runs/architectures --table docs/models.md

On each: sft, reward, dpo, ppo with a separate and a shared critic, grpo with LoRA, evaluate; log-probs of the sampler,
gradients and saved results are compared with plain transformers. What is finished is not made again. `--table` writes
the table between the marks of a document.
"""

import argparse
import json
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures_make import tiny_model
from architectures_table import write_table
from architectures_verbs import compare, compare_bfloat16, saved_gap, verbs
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from keel.errors import KeelError
from keel.models.heads import UNFIT

RESULTS = {"sft": "model", "dpo": "policy", "ppo": "policy", "ppo shared": "policy", "grpo lora": "policy"}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, required=True, help="folder of the results, FAMILY.json each")
    options.add_argument("--families", nargs="+", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    options.add_argument("--seconds", type=int, default=300, help="most wall time for a family")
    options.add_argument("--again", action="store_true", help="also families whose result is there")
    options.add_argument("--table", type=Path, help="write the table of all results into this document, and run none")
    given = options.parse_args()
    if given.table:
        write_table(given.output, given.table)
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    for family in given.families:
        path = given.output / f"{family}.json"
        if path.exists() and not given.again:
            continue
        result = within(given.seconds, lambda family=family: tried(family))
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(family, json.dumps(result), flush=True)


def within(seconds: int, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a job, or that it took too long. Raises nothing."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    started = time.monotonic()
    try:
        return {**job(), "seconds": round(time.monotonic() - started, 1)}
    except TimeoutError as error:
        return {"late": str(error)}
    finally:
        signal.alarm(0)


def tried(family: str) -> dict[str, Any]:
    """Outcome of each verb, and what was compared."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "tiny"
        try:
            tiny_model(family, folder)
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001  # checks of configs have classes of their own
            return {"not made": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        found: dict[str, Any] = {}
        found["compare"] = outcome(lambda: found.update(compare(folder)))
        if not found["compare"].startswith("refused"):
            found["in bfloat16"] = outcome(lambda: found.update(compare_bfloat16(folder)))
            for name, run in verbs(folder, Path(work)).items():
                found[name] = outcome(run)
                if found[name] == "works" and name in RESULTS:
                    result = Path(work) / name.replace(" ", "-") / RESULTS[name]
                    found[f"{name} saved"] = outcome(
                        lambda name=name, at=result: found.update({f"{name} gap": saved_gap(at)})
                    )
        return {name: without(work, value) for name, value in found.items()}


def without(work: str, value: Any) -> Any:
    """Return the value without the temporary folder in its text."""
    return value.replace(f"{work}/", "") if isinstance(value, str) else value


def outcome(run: Callable[[], Any]) -> str:
    """works; refused, with the line that keel prints; or crashes."""
    try:
        run()
    except TimeoutError:
        raise
    except KeelError as error:
        return f"refused: {error}"
    except (*UNFIT, OSError, ImportError, LookupError, ArithmeticError) as error:  # what code of a family raises
        return f"crashes: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "works"


if __name__ == "__main__":
    main()
