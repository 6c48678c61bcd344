"""Reading a corpus: `python -m benchmarks.encode [--rounds 5] [--megabytes 500] [--text FILE]`.

Encodes a text, repeated up to the size asked for, in a process of its own with an empty cache: hashing, vocabulary and
ids, as a first run does. Tells megabytes a second and the most memory that encoding took beyond what was there before.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import parser, spread, take_turns, write
from gptexp.config.sections import DataConfig
from gptexp.data.corpora import find_corpus
from gptexp.data.encoding import encode_corpus


def encode(path: str) -> None:
    """Print the seconds that encoding takes, and its memory in MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    config = DataConfig(name="file", path=path)
    encode_corpus(find_corpus(config))
    seconds = time.perf_counter() - begin
    print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Measure, print the table and write the JSON."""
    arguments = parser(__doc__, "encode")
    arguments.add_argument("--megabytes", type=int, default=500)
    arguments.add_argument("--text", type=Path, help="a text to repeat; tiny Shakespeare unless given")
    arguments.add_argument("--encode", help="encode this file once, and print seconds and MiB")
    asked = arguments.parse_args()
    if asked.encode:
        encode(asked.encode)
        return
    source = asked.text or find_corpus(DataConfig(offline_fallback=None)).path
    memory = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        with path.open("wb") as file:
            text = source.read_bytes()
            for _ in range(-(-asked.megabytes * 10**6 // len(text))):
                file.write(text)
        size = path.stat().st_size / 1e6

        def speed() -> float:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                out = subprocess.run(
                    [sys.executable, "-m", "benchmarks.encode", "--encode", str(path)], check=True, text=True,
                    capture_output=True, env=os.environ | {"GPTEXP_CACHE": cache},
                ).stdout.split()  # fmt: skip
                memory.append(float(out[1]))
                return size / float(out[0])

        rounds = take_turns({source.name: speed}, asked.rounds)
    report = {"MB/s": spread([r[source.name] for r in rounds]), "MiB": spread(memory)}
    table = Table("", "median", "lowest", "highest", title=f"{size:,.0f} MB of {source.name}")
    for name, values in report.items():
        table.add_row(name, *(f"{v:.0f}" for v in values.values()))
    Console().print(table)
    write(asked.out, {"text": str(source), "megabytes": size, **report})


if __name__ == "__main__":
    main()
