"""Compiles what the masks suite runs on a CUDA device, in several processes, so that a run only measures.

python scripts/gpu_masks.py [--lengths 16384] [--processes 8] [--seconds 90]
    checks ours and FlexAttention on every mask and takes a step with each; PyTorch and Triton keep what
    they compiled on disk, where `foveal bench --suite masks` finds it
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))


def main() -> int:
    options = _parser().parse_args()
    if options.case is not None:
        return _compile(options.lengths, options.case)
    from foveal.bench.masks import MASKS

    waiting = list(range(len(MASKS)))
    running: dict[int, subprocess.Popen[bytes]] = {}
    end = time.monotonic() + options.seconds
    failed = 0
    while (waiting or running) and time.monotonic() < end:
        while waiting and len(running) < options.processes:
            number = waiting.pop(0)
            command = [sys.executable, __file__, "--lengths", options.lengths]
            running[number] = subprocess.Popen([*command, "--case", str(number)])
        for number, process in list(running.items()):
            if process.poll() is not None:
                failed += process.returncode != 0
                del running[number]
        time.sleep(0.1)
    for process in running.values():
        process.kill()
    print(f"{len(running) + len(waiting)} masks not compiled in time, {failed} failed", flush=True)
    return int(failed > 0)


def _compile(lengths: str, number: int) -> int:
    import torch

    from foveal.bench.baselines.flex import Flex
    from foveal.bench.gate import Gate
    from foveal.bench.masks import MASKS, masks_suite
    from foveal.bench.ours import Foveal

    device, status = torch.device("cuda"), 0
    cases = masks_suite(device, tuple(int(n) for n in lengths.split(","))).cases
    for case in cases[number :: len(MASKS)]:
        inputs = case.inputs(device)
        gate = Gate(case, inputs)
        for competitor in (Foveal("hopper"), Foveal("triton"), Flex()):
            if competitor.refuses(case, device):
                continue
            began = time.monotonic()
            try:
                prepared = competitor.prepare(case, inputs)
                gate.verdicts(prepared, competitor)
                steps = prepared.loss_and_gradients()
                assert steps is not None
                prepared.forward()
                steps[1](steps[0]())
                torch.cuda.synchronize()
                outcome = "done"
            except Exception as error:
                outcome, status = f"{type(error).__name__}: {error}"[:300], 1
            print(
                f"{case.name}: {competitor.title}: {time.monotonic() - began:.1f} s, {outcome}",
                flush=True,
            )
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", default="16384", help="tokens, joined by commas")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--case", type=int, help="compile this mask only, in this process")
    return parser


if __name__ == "__main__":
    sys.exit(main())
