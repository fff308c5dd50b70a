"""The metrics of vLLM engines, on the process's ``/metrics``: of all that run in it, and of those alone.

vLLM itself keeps the metrics of one engine in prometheus_client's registry, and takes them away when another one
starts. Here each engine has a registry of its own, and one collector shows them all.
"""

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class _Engines(Collector):
    """Shows the metrics of all engines, those of one name together."""

    def __init__(self) -> None:
        self._registries: list[CollectorRegistry] = []
        self._lock = threading.Lock()
        self._registered = False

    def add(self, registry: CollectorRegistry) -> None:
        with self._lock:
            self._registries = [*self._registries, registry]
            if not self._registered:
                self._registered = True
                REGISTRY.register(self)

    def remove(self, registry: CollectorRegistry) -> None:
        with self._lock:
            self._registries = [other for other in self._registries if other is not registry]

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for registry in self._registries:
            for family in registry.collect():
                families.setdefault(family.name, family)
                if families[family.name] is not family:
                    families[family.name].samples.extend(family.samples)
        yield from families.values()


_engines = _Engines()


def stat_logger(registry: CollectorRegistry) -> Any:
    """Give the class of vLLM's logger of statistics that keeps them in `registry`."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    gauge, counter, histogram = (staticmethod(partial(kind, registry=registry)) for kind in (Gauge, Counter, Histogram))
    kinds = {"_gauge_cls": gauge, "_counter_cls": counter, "_histogram_cls": histogram}
    parts = {}  # it has loggers of its own for some features, which make metrics as it does
    for name in ("_spec_decoding_cls", "_kv_connector_cls", "_ec_connector_cls", "_perf_metrics_cls"):
        if (part := getattr(PrometheusStatLogger, name, None)) is not None:
            parts[name] = type(part.__name__, (part,), kinds)
    return type("EngineStatLogger", (PrometheusStatLogger,), kinds | parts)


def show(registry: CollectorRegistry) -> None:
    """Have the metrics of a registry on ``/metrics``, until they are hidden."""
    _engines.add(registry)


def hide(registry: CollectorRegistry) -> None:
    _engines.remove(registry)
