"""What every benchmark's JSON says of the machine, and the ratio table after the run."""

from lm2_kernels.bench import suite
from lm2_kernels.terminal import columns


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["lm2_kernels"] = suite.conditions()


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [b for b in getattr(session, "benchmarks", []) if "times ours" in b.extra_info]
    if not benchmarks:
        return
    groups: dict[str, list[str]] = {}
    for benchmark in benchmarks:
        row = benchmark.params["row_name"]
        ratio = benchmark.extra_info["times ours"]
        groups.setdefault(benchmark.group, []).append(f"{row} {ratio:.2f}")
    terminalreporter.section("time by our first backend's, median of paired rounds")
    for line in columns([[group, "  ".join(cells)] for group, cells in groups.items()]):
        terminalreporter.write_line(line)
