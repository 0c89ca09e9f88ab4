"""What it costs to load one modality of a large checkpoint: pruned while loading, against loading everything and then
pruning, and against the equivalent checkpoint that somebody has pruned before.

    python benchmarks/hub.py            # base size, about 1 GB; minutes
    python benchmarks/hub.py --rounds 3 --size small

Random weights with planted statistics: each of four modalities uses two of six experts in a layer. Each load is a fresh
process, which reads every weight once it has the model. "Disk" is cold: files are dropped from the page cache before
each load, where the system can do that. "Hub" is a server on loopback with the real client and an empty cache. Rounds
are interleaved; ratios are of the same round, printed as median and quartiles.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the Hub of the tests

MODALITY = "s1"
LOADS = {
    "full, then pruned": ("whole", "prune"),
    "pruned while loading": ("grouped", "modalities"),
    "pruned while loading, one file": ("whole", "modalities"),
    "already pruned": ("pruned", "plain"),
}


def make(folder: Path, size: str) -> dict[str, float]:
    """Write the three checkpoints; seconds that pruning in memory takes, and megabytes of weights kept."""
    from modeling_mapex import MapexConfig, MapexForPreTraining

    config = MapexConfig.from_preset(size, ["s1", "s2", "rgb", "dem"])
    layers = len(config.moe_layers)
    config.expert_statistics = {}
    for index, name in enumerate(config.modalities):
        rows = [[0.001] * config.num_experts for _ in range(layers)]
        for layer, row in enumerate(rows):
            row[(index + layer) % 6], row[(index + layer + 1) % 6] = 0.6, 0.396
        config.expert_statistics[name] = {"tokens": 1000, "usage": rows, "gate": rows, "saliency": rows}
    model = MapexForPreTraining(config)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "grouped", shard_by_modality=True)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        pruned = model.prune_for_modalities([MODALITY])
        seconds.append(time.perf_counter() - start)
    pruned.save_pretrained(folder / "pruned")
    kept = sum(tensor.nbytes for tensor in pruned.state_dict.values())
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {"seconds": statistics.median(seconds), "kept": kept / 1e6, "whole": whole / 1e6}


def load(source: str, how: str) -> dict[str, float]:
    """In a process of its own: load, read every weight, and report."""
    import torch
    from peak_memory import peak_megabytes, reset_peak
    from transformers.utils import logging

    from modeling_mapex import MapexForPreTraining

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    reset_peak()
    before_memory = peak_megabytes()
    before_read = bytes_read()
    start = time.perf_counter()
    if how == "modalities":
        model = MapexForPreTraining.from_pretrained(source, modalities=[MODALITY])
    else:
        model = MapexForPreTraining.from_pretrained(source)
        if how == "prune":
            model = model.prune_for_modalities([MODALITY]).build()
    checksum = sum(float(parameter.sum()) for parameter in model.parameters())
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "memory": peak_megabytes() - before_memory,
        "read": (bytes_read() - before_read) / 1e6,
        "checksum": checksum,
    }


def bytes_read() -> int:
    """Bytes that this process has fetched from storage, 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def drop_from_cache(folder: Path) -> None:
    """So that the next process reads from storage."""
    if hasattr(os, "posix_fadvise"):
        os.sync()
        for file in folder.glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def run(source: str, how: str, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--load", source, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, rounds: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    from hub_server import HubServer
    from tqdm import tqdm

    results = {place: {name: [] for name in LOADS} for place in ("disk", "hub")}
    with HubServer(folder / "server") as hub:
        for name in ("whole", "grouped", "pruned"):
            hub.put_folder(f"me/{name}", folder / name)
        for _ in tqdm(range(rounds), desc="Rounds", unit="round"):
            for name, (checkpoint, how) in LOADS.items():
                drop_from_cache(folder / checkpoint)
                results["disk"][name].append(run(str(folder / checkpoint), how, dict(os.environ)))
                with tempfile.TemporaryDirectory(dir=folder) as home:
                    hub.reset_counters()
                    result = run(f"me/{checkpoint}", how, hub.environment(Path(home)))
                    results["hub"][name].append({**result, "served": hub.bytes_served / 1e6})
    return results


def report(results: dict[str, dict[str, list[dict[str, float]]]], facts: dict[str, float]) -> None:
    print(f"\nprune_for_modalities in memory: {facts['seconds']:.2f} s")
    print(f"kept: {facts['kept']:.0f} of {facts['whole']:.0f} MB")
    for place, loads in results.items():
        quantities = ["seconds", "read", "memory"] if place == "disk" else ["seconds", "served", "memory"]
        units = {"seconds": "s", "read": "MB read", "served": "MB served", "memory": "MB peak"}
        print(f"\n{'from ' + place:<34}" + "".join(f"{units[quantity]:>12}" for quantity in quantities))
        for name, runs in loads.items():
            values = [statistics.median(one[quantity] for one in runs) for quantity in quantities]
            print(f"{name:<34}" + "".join(f"{value:12.2f}" if value < 100 else f"{value:12.0f}" for value in values))
    print(f"\n{'ratios':<58}{'ratio':>8}{'quartiles':>18}")
    for place, loads in results.items():
        for other in ("full, then pruned", "already pruned"):
            for quantity in ("seconds", "memory", "served" if place == "hub" else "read"):
                for name in ("pruned while loading", "pruned while loading, one file"):
                    pairs = zip(loads[name], loads[other])
                    ratios = sorted(one[quantity] / another[quantity] for one, another in pairs if another[quantity])
                    if not ratios:
                        continue
                    low, middle, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
                    title = f"{place}: {quantity}, {name.removeprefix('pruned while loading') or 'grouped'} / {other}"
                    print(f"{title.replace(', , ', ', '):<58}{middle:8.3f}{low:9.3f} .. {high:.3f}")
        memory = statistics.median(one["memory"] for one in loads["pruned while loading"])
        print(f"{place + ': peak memory beside the interpreter / weights kept':<58}{memory / facts['kept']:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="base", help="preset of the model")
    parser.add_argument("--folder", type=Path, help="where to work, about 6 GB for base; default a temporary folder")
    parser.add_argument("--load", nargs=2, metavar=("SOURCE", "HOW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(*arguments.load)))
        return
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="mapex-hub-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        facts = make(folder, arguments.size)
        results = measure(folder, arguments.rounds)
        checksums = {one["checksum"] for loads in results.values() for runs in loads.values() for one in runs}
        if len(checksums) != 1:
            raise SystemExit(f"The models differ: {checksums}")
        report(results, facts)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
