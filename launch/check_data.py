"""Look through a dataset before training, and tell everything that is wrong with it at once.

    python launch/check_data.py CONFIG [key.path=value ...] [--decode] [--ranks N]
    python launch/check_data.py MANIFEST [MANIFEST ...] [--duration-sec S] [--decode] [--ranks N]

CONFIG is a file of `launch/train.py` (.yaml), with its overrides; a MANIFEST is a .jsonl, a folder
of them, or path:weight,path:weight, as `data.train_data` takes it. Every manifest line, audio
header (or header of ready codes) and alignment file is read; `--decode` reads all samples too, and
finds audio that breaks off or is damaged after its header. No model, codes or GPU is needed, and
nothing is written.

Problems name manifest and line; with any of them the exit code is 2. Most of them training would
refuse, too, at the start or where it encodes; two it would take and learn little from: words far
outside their audio, and alignments without a word of SPEAKER_MAIN. Notes tell what training takes
in its own way: other sample rates are resampled to 24 kHz (mono is refused), words of others are
left out, a recording that is named twice is met twice.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder first on the path; the packages stand one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from launch.config import load_config, parse_command_line
from launch.configuration.schema import TrainConfig
from launch.errors import UserError, exit_with
from launch.feeding.batch_plan import carries_states, length_stages
from ttt_dist.data.check import (
    FileReport,
    check_contents,
    collect_notes,
    too_few_pieces,
    too_few_recordings,
)
from ttt_dist.data.manifest import all_recordings, scan_sources

CONFIG_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class DataUse:
    """What is read, and how training would.

    Attributes:
        specs: specifications by the name to call them.
        duration_sec: length of a piece, the longest if they grow.
        lanes_a_rank: recordings that a rank follows side by side at least; None: it takes pieces.
    """

    specs: dict[str, str]
    duration_sec: float
    lanes_a_rank: int | None = None


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; a mistake in it ends the process with argparse's message."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", metavar="CONFIG|MANIFEST|key=value")
    parser.add_argument("--decode", action="store_true", help="read all samples, not headers alone")
    parser.add_argument(
        "--ranks", type=int, default=1, help="data-parallel ranks that training will have (1)"
    )
    parser.add_argument("--duration-sec", type=float, help="length of a piece; of CONFIG, or 10")
    return parser.parse_args(arguments)


def find_data(arguments: argparse.Namespace) -> DataUse:
    """What the command line asks for.

    Raises:
        UserError: the configuration has mistakes, or configurations and manifests are mixed.
    """
    configs = [item for item in arguments.what if item.endswith(CONFIG_SUFFIXES)]
    overrides = [item for item in arguments.what if "=" in item and not Path(item).exists()]
    manifests = [
        item
        for item in arguments.what
        if item not in overrides and not item.endswith(CONFIG_SUFFIXES)
    ]
    default = TrainConfig.model_fields["duration_sec"].default
    if manifests and not configs and not overrides:
        specs = {item: item for item in manifests}
        duration = arguments.duration_sec
        if duration is None:
            duration = default
        if not duration > 0:
            raise UserError(f"--duration-sec: found {duration:g}, allowed are seconds above 0")
        return DataUse(specs, duration)
    if manifests or len(configs) > 1:
        raise UserError("command line: allowed are manifests, or one CONFIG (.yaml) and key=value")
    if arguments.duration_sec is not None:
        raise UserError("--duration-sec: with a CONFIG, write duration_sec=SECONDS")
    config = load_config(*parse_command_line([*configs, *overrides]))
    named = {"data.train_data": config.data.train_data, "data.eval_data": config.data.eval_data}
    specs = {key: spec for key, spec in named.items() if spec or key == "data.train_data"}
    lanes = config.batch_size if carries_states(config) else None
    return DataUse(specs, max(length_stages(config).values()), lanes)


def check_data(use: DataUse, *, ranks: int, decode: bool) -> tuple[list[str], list[str], list[str]]:
    """Problems, notes and a summary of each specification."""
    problems: list[str] = []
    summary: list[str] = []
    everything: list[FileReport] = []
    for field, spec in use.specs.items():
        sources, found = scan_sources(spec, field=field)
        problems += found
        recordings = all_recordings(sources)
        with tqdm(
            total=len(recordings), desc=field, unit="file", disable=not sys.stderr.isatty()
        ) as bar:
            reports = check_contents(recordings, decode=decode, progress=bar.update)
        problems += [problem for report in reports for problem in report.problems]
        pieces = sum(report.pieces(use.duration_sec) for report in reports)
        # What is shared by all ranks of a step; an evaluation fills up with empty pieces.
        if field != "data.eval_data":
            if use.lanes_a_rank is None:
                problems += too_few_pieces(pieces, ranks, use.duration_sec, field)
            else:
                problems += too_few_recordings(len(reports), use.lanes_a_rank * ranks, field)
        hours = sum(report.seconds for report in reports) / 3600
        summary.append(
            f"{field}: recordings: {len(reports)}, hours: {hours:.2f}, pieces of "
            f"{use.duration_sec:g} s: {pieces}"
        )
        everything += reports
    return problems, collect_notes(everything), summary


def main(arguments: Sequence[str]) -> None:
    """Run the command; problems end it with exit code 2 and one message."""
    parsed = parse_arguments(arguments)
    try:
        if parsed.ranks < 1:
            raise UserError(f"--ranks: found {parsed.ranks}, allowed is 1 or above")
        problems, notes, summary = check_data(
            find_data(parsed), ranks=parsed.ranks, decode=parsed.decode
        )
    except UserError as error:
        exit_with(UserError(error.problems, title="Can't check the data"))
    for note in notes:
        print(f"note: {note}")
    read = "headers, alignments and samples" if parsed.decode else "headers and alignments"
    for line in summary:
        print(line)
    print(f"problems: {len(problems)}, notes: {len(notes)} ({read} read)", flush=True)
    if problems:
        exit_with(UserError(problems, title="This data can't be used"))


if __name__ == "__main__":
    main(sys.argv[1:])
