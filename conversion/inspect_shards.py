"""What is in shards, whether it is whole, and how it looks.

    python conversion/inspect_shards.py shards/bigearthnet                       # counts, sizes, sensors, labels
    python conversion/inspect_shards.py shards/bigearthnet --validate            # and read every byte
    python conversion/inspect_shards.py shards/bigearthnet --sheet chips.png     # and draw a sheet of example chips
    python conversion/inspect_shards.py shards/bigearthnet --json                # for other programs

The exit code is 1 if validation finds something wrong, 2 if there are no shards.
"""

import argparse
import json
import sys

from modeling_mapex.data_mapex import stream_shards
from modeling_mapex.inspection_mapex import describe_shards, validate_shards


def print_description(description: dict) -> None:
    print(description["title"] or "untitled")
    print(
        f"{description['samples']} samples of {description['places']} places in {description['shards']} shards, "
        f"{description['bytes'] / 1e6:.1f} MB"
    )
    print(f"\n{'modality':16}{'present':>8}{'missing':>8}  {'unit':12}{'type':9}{'metres':16}{'sizes':28}bands")
    for name, entry in description["modalities"].items():
        low, high = entry.get("gsd", (0, 0))
        metres = f"{low:.4g}" if high - low <= 1e-3 * high else f"{low:.4g} .. {high:.4g}"
        sizes = ", ".join(f"{size} ({count})" for size, count in entry["sizes"].most_common(2))
        sizes += f" and {len(entry['sizes']) - 2} more" if len(entry["sizes"]) > 2 else ""
        print(
            f"{name:16}{entry['present']:8}{entry['missing']:8}  {entry['unit']:12}{entry['dtype']:9}{metres:16}"
            f"{sizes:28}{' '.join(entry['bands'])}"
        )
    for name, entry in description["labels"].items():
        print(f"\nlabel {name}: {entry['kind']}, missing in {entry['missing']} samples")
        total = sum(entry["histogram"].values())
        for value, count in entry["histogram"].most_common():
            print(f"  {value[:60]:60}{count:12}{100 * count / total:7.1f} %")


def draw_sheet(args: argparse.Namespace, total: int) -> None:
    try:
        from modeling_mapex.visualization_mapex import plot_samples

        wanted = {round(index * (total - 1) / max(args.samples - 1, 1)) for index in range(min(args.samples, total))}
        stream = stream_shards(args.shards, args.split)
        chosen = [sample for index, sample in enumerate(stream) if index in wanted]
        plot_samples(chosen, stream.schema.labels).savefig(args.sheet, dpi=110)
    except ImportError as error:
        sys.exit(f"error: a sheet needs matplotlib: pip install matplotlib ({error})")
    print(f"\n{len(chosen)} chips: {args.sheet}", file=sys.stderr if args.json else sys.stdout)


def main(args: argparse.Namespace) -> None:
    description = describe_shards(args.shards, args.split)
    if args.json:
        print(json.dumps(description, indent=2))
    else:
        print_description(description)
    if args.sheet:
        draw_sheet(args, description["samples"])
    if args.validate:
        problems = validate_shards(args.shards, args.split)
        for problem in problems:
            print(problem, file=sys.stderr)
        if problems:
            sys.exit(1)
        print("\nvalid: every row fits its description", file=sys.stderr if args.json else sys.stdout)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="Folder of shards.")
    parser.add_argument("--split", default="train", help="Which split of them.")
    parser.add_argument("--validate", action="store_true", help="Read everything and report what is wrong.")
    parser.add_argument("--sheet", help="PNG to draw example chips to. Needs matplotlib.")
    parser.add_argument("--samples", type=int, default=8, help="Chips on the sheet, spread over the split.")
    parser.add_argument("--json", action="store_true", help="Print the description as JSON.")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
