"""One case of the memory benchmark in a process of its own; benchmarks/memory.py starts it and reads its JSON."""

import argparse
import json
from dataclasses import replace

from benchmarks.common import reset_peak, resident_bytes
from benchmarks.layouts_rank import config_of, local_batch
from benchmarks.step_sides import FULL, QUICK, Workload
from engine.config.phases import first_phase
from engine.config.read import Config, check_layout
from engine.objectives.contrastive.step import ContrastiveStep
from engine.parallel.launch import job
from engine.trainer import Trainer


def measure(config: Config, workload: Workload) -> dict[str, float]:
    """Peak of two steps on one rank, in GB above what is resident once the model is built; k; what was promised."""
    with job(config.parallel) as (mesh, device):
        trainer = Trainer(first_phase(config), mesh, device)
        training = trainer.training_step
        assert isinstance(training, ContrastiveStep)
        promised = training.activations.micro_batch_bytes()
        captions = training.activations.caption_bytes()
        before = reset_peak()
        for step in range(2):
            trainer.step(local_batch(workload, step, mesh))
        return {
            "keep": training.keep,
            "micro_batches": training.program.micro_batches,
            "activation_gb": promised / 1e9,
            "captions_gb": captions / 1e9,
            "built_gb": before / 1e9,
            "peak_gb": (resident_bytes("VmHWM") - before) / 1e9,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options", nargs="*", help="dotted.key=value")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batch", type=int, required=True)
    arguments = parser.parse_args()
    workload = replace(QUICK if arguments.quick else FULL, batch=arguments.batch)
    config = config_of(workload, ["train.keep_activations=0", *arguments.options])
    check_layout(config, 1)
    print(json.dumps(measure(config, workload)))


if __name__ == "__main__":
    main()
