"""Lightning glue only: when to measure, what to feed, where to log."""

from ssl_geometry.callbacks.checkpoints import KeptCheckpoint, LastCheckpoint, SameStart
from ssl_geometry.callbacks.evaluation import EvaluateAtStart
from ssl_geometry.callbacks.finite import StopOnNaN
from ssl_geometry.callbacks.interruption import LostProcess, StopOnSignal, data_worker_died
from ssl_geometry.callbacks.loggers import LoggerName, ResumableWandbLogger, make_loggers
from ssl_geometry.callbacks.monitor import GeometryMonitor
from ssl_geometry.callbacks.processes import Status, WatchProcesses
from ssl_geometry.callbacks.progress import FitProgress
from ssl_geometry.callbacks.records import FlushRecords, LogEveryEpoch, RecordsLogger
from ssl_geometry.callbacks.seeding import SeedSteps

__all__ = [
    "EvaluateAtStart",
    "FitProgress",
    "FlushRecords",
    "GeometryMonitor",
    "KeptCheckpoint",
    "LastCheckpoint",
    "LogEveryEpoch",
    "LoggerName",
    "LostProcess",
    "RecordsLogger",
    "ResumableWandbLogger",
    "SameStart",
    "SeedSteps",
    "Status",
    "StopOnNaN",
    "StopOnSignal",
    "WatchProcesses",
    "data_worker_died",
    "make_loggers",
]
