"""How far an exported LoRA in PEFT is from the routed task, in float32 and in bfloat16.

    python benchmarks/export_rounding.py RUN --data starter

Distances are norms of differences of logits over the norm of the logits, over all tokens of one
prompt of each training task. What bfloat16 does to the base model alone is the measure of what two
programs can differ by that round in different places.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

import polyroute as pr
from polyroute.program.commands.runs import BaseModel

RESULTS = Path(__file__).parent / "results" / "export_rounding.json"


def logits_of(run: Path, data: str, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """For each task the logits of the base model, the routed one, and PEFT's with the export.

    The weights are those of bfloat16 in either type.
    """
    base: Any
    base, tokenizer = pr.load_base(BaseModel.of(run).name, dtype="bfloat16")
    base = base.to(dtype)
    kind, suite = pr.kind_of(base, tokenizer), pr.open_suite(data)
    found: dict[str, dict[str, Tensor]] = {}
    for task in pr.read_checkpoint(run).tasks:
        row = pr.encoded_mixture(suite, [task], "test", kind)[0]
        inputs = {"input_ids": torch.tensor([row["prompt_ids"]])}
        model = pr.from_pretrained(base, run, check_base=False)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            own = {"routed": model(**inputs, tasks=[task]).logits.float()}
            model.export_peft(task, folder)
            base = model.unload()
            own["base"] = base(**inputs).logits.float()
            adapted: Any = PeftModel.from_pretrained(base, folder)
            own["peft"] = adapted(**inputs).logits.float()
            base = adapted.unload()
        found[task] = own
    return found


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    exact, rounded = (
        logits_of(options.run, options.data, dtype) for dtype in (torch.float32, torch.bfloat16)
    )

    def distance(one: dict[str, Any], a: str, other: dict[str, Any], b: str) -> dict[str, float]:
        far = [float((one[t][a] - other[t][b]).norm() / other[t][b].norm()) for t in exact]
        return {"median": statistics.median(far), "largest": max(far)}

    results = {
        "tasks": len(exact),
        "float32: PEFT from routed": distance(exact, "peft", exact, "routed"),
        "bfloat16: PEFT from routed": distance(rounded, "peft", rounded, "routed"),
        "bfloat16 routed from float32": distance(rounded, "routed", exact, "routed"),
        "bfloat16 PEFT from float32": distance(rounded, "peft", exact, "routed"),
        "bfloat16 base alone from float32": distance(rounded, "base", exact, "base"),
        "routed from base alone, float32": distance(exact, "routed", exact, "base"),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
