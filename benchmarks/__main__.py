"""Measure this framework beside its rivals, on one machine and one Kafka, and write a report.

    python -m benchmarks                     # everything: about 25 minutes, on two cores
    python -m benchmarks --quick             # the rows that are watched for regressions: under three minutes
    python -m benchmarks --only unary streams

The rivals need the packages of the extra `bench` (`requirements-bench.lock`); the workloads of a quick run don't.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import processes, quick, report
from benchmarks.bench import Bench, Workload, say
from benchmarks.workloads import composed, embedded, serving, streaming, unary

WORKLOADS: Mapping[str, Workload] = {
    "unary": unary.measure,
    "streams": streaming.fast,
    "embedded": embedded.measure,  # and fused
    "memory": serving.memory,
    "paced": streaming.paced,
    "two_hops_http": composed.two_hops_http,
    "hops": composed.hops,
    "fan_out": composed.fan_out,
    "scaling": serving.scaling,
    "ingest": serving.ingest,
    "cold_start": serving.cold_start,
}
QUICK = ("unary", "streams", "embedded", "memory")
RESULTS = processes.ROOT / "benchmarks" / "results"
RETENTION = ("log.retention.bytes=134217728", "log.segment.bytes=33554432")  # what has been read makes room


def measure(bench: Bench, names: Sequence[str]) -> None:
    say("--- warming up Kafka")
    unary.warm_up(bench)
    for name in names:
        say(f"--- {name}")
        WORKLOADS[name](bench)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only what is watched for regressions")
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), metavar="NAME", help=", ".join(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5, help="(5); rivals without a target are measured less often")
    parser.add_argument("--kafka", metavar="URL", help="kafka://host:port; one of our own is started if none is named")
    parser.add_argument("--results", type=Path, metavar="DIR", help=f"({RESULTS}; of a quick run none, unless named)")
    parser.add_argument("--accept", action="store_true", help="of a quick run: commit to its ratios")
    given = parser.parse_args(arguments)
    names = given.only or (QUICK if given.quick else list(WORKLOADS))
    with processes.kafka(given.kafka, *RETENTION) as url:
        bench = Bench(url, given.repeats, quick=given.quick)
        try:
            measure(bench, names)
        except KeyboardInterrupt:
            say("stopped: here is what was measured so far")
    folder = given.results or (None if given.quick else RESULTS)
    if folder is not None:
        print(report.targets(report.write(bench.measurements, folder).rows))
        say(f"wrote {folder}/report.md")
    return quick.check(bench.measurements, accept=given.accept) if given.quick else 0


if __name__ == "__main__":
    sys.exit(main())
