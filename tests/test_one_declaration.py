"""One field added to `MHRConfig` in the source arrives everywhere, with no other line changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polyroute

FIELD = '''
    sharpness: float = setting(
        1.0, number(above=0), computes=True, help="How sharp gates are."
    )
    """How sharp gates are."""
'''
PLACE = "    anneal_steps: int = setting("
SCRIPT = """
import dataclasses, json, sys
import torch
from torch import nn
import polyroute as pr

def error(call):
    try:
        call()
    except pr.InputError as found:
        return str(found)

found = {"where": pr.__file__}
found["refused"] = error(lambda: pr.MHRConfig(sharpness=-1))
def attached(**config):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4))
    return pr.attach(base, pr.MHRConfig(num_skills=2, num_heads=2, **config), ["a"])
attached(sharpness=3).save_pretrained("saved")
found["saved"] = json.load(open("saved/polyroute.json"))["config"]["sharpness"]
torch.manual_seed(0)
again = pr.from_pretrained(nn.Sequential(nn.Linear(4, 4)), "saved")
found["loaded"] = again.adapter_config.sharpness
found["other"] = error(lambda: attached(sharpness=2).load_adapter("saved"))
from polyroute import peft as pp
config = pp.MHRConfig(tasks=["a"], sharpness=2.5)
found["peft"] = [config.sharpness, config.settings().sharpness, config.to_dict()["sharpness"]]
found["peft refused"] = error(lambda: pp.MHRConfig(tasks=["a"], sharpness=0))
from polyroute.exchange.peft_mhr import write_peft_mhr
write_peft_mhr(again, "adapter")
found["written"] = json.load(open("adapter/adapter_config.json"))["sharpness"]
from polyroute.exchange.mttl_export import write_mttl
from polyroute.exchange.peft_poly import write_peft_poly
found["others"] = [error(lambda: write(again, "out")) for write in (write_mttl, write_peft_poly)]
from polyroute.program.options.train import TrainOptions
from polyroute.program.options.flags import flags_of
found["flags"] = [flag.name for flag in flags_of(TrainOptions) if "sharp" in flag.name]
print(json.dumps(found))
"""


def test_a_field_of_the_source_arrives_everywhere(tmp_path: Path) -> None:
    package = tmp_path / "polyroute"
    shutil.copytree(Path(polyroute.__file__).parent, package)
    config = package / "config.py"
    text = config.read_text(encoding="utf-8")
    assert text.count(PLACE) == 1
    config.write_text(text.replace(PLACE, FIELD.lstrip("\n") + PLACE), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = json.loads(run("-c", SCRIPT).splitlines()[-1])
    assert Path(found["where"]).is_relative_to(tmp_path)
    assert found["refused"] == "sharpness must be positive, not -1"
    assert found["saved"] == found["loaded"] == found["written"] == 3.0
    assert "has sharpness=3.0 and this model sharpness=2.0" in found["other"]
    assert found["peft"] == [2.5] * 3
    for program, message in zip(("mttl", "PEFT's Poly"), found["others"], strict=True):
        assert message.startswith(
            f"{program} has no setting 'sharpness', and this inventory has sharpness=3.0"
        )
    assert found["peft refused"] == "sharpness must be positive, not 0"
    assert found["flags"] == ["sharpness"]
    shown = run("-m", "polyroute", "train", "--help")
    assert "--sharpness" in shown
    assert "How sharp gates are." in shown
