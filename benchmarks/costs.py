"""All costs on whatever accelerator is there, into ``data/accelerator``: what to run on a new machine.

    python benchmarks/costs.py --write          # an accelerator: 10 to 20 minutes
    python benchmarks/costs.py --quick          # small sizes, to see that all of it runs

On an accelerator: the step at batch 256 in bf16, the refresh against width, diagnose, every PTQ method, all of ViT-B,
and the speed that ``s2d estimate --speed`` reads, checked on held-out networks. On a CPU: the step of ViT-S at a small
batch, and the same of the rest. Each part is a script of its own beside this one; one that fails does not end the
others, and is named in the end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from common import best_device, hardware

HERE = Path(__file__).resolve().parent


def commands(device: str, quick: bool, write: bool) -> list[list[str]]:
    """The command lines, those first whose tables count most if the time runs out."""
    on_cpu, keep = device == "cpu", ["--write"] if write else []
    large = "vit_small_patch16_224" if on_cpu or quick else "vit_base_patch16_224"
    step = ["--batch", "4", "--interval", "20", "--blocks", "3"] if on_cpu else ["--batch", "256", "--blocks", "3"]
    if quick:
        large, step = "vit_tiny_patch16_224", ["--batch", "2", "--interval", "2", "--blocks", "2"]
    widths = ["--quick"] if quick else []
    images = ["--images", "2"] if quick else []
    return [
        ["estimate.py", *(["--quick", "--seconds", "2"] if quick else []), *keep],
        ["step_overhead.py", "--model", large, *step, *keep],
        ["refresh.py", "--only", "width", *widths, *keep],
        ["diagnose.py", "--model", large, *images, *keep],
        ["ptq_cost.py", "--model", large, "--device", device, "--images", "2" if quick else "32"],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="keep the tables in data/accelerator")
    args = parser.parse_args()
    print(hardware(args.device), flush=True)
    failed = []
    for script, *options in commands(args.device, args.quick, args.write):
        device = [] if "--device" in options else ["--device", args.device]
        print(f"\n== {script} {' '.join(options)}", flush=True)
        if subprocess.run([sys.executable, str(HERE / script), *options, *device]).returncode:
            failed.append(script)
    print(f"\n{'all done' if not failed else 'failed: ' + ', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
