"""Lightning glue only: when to measure, what to feed, where to log."""

from ssl_geometry.callbacks.cka import CKAMonitor
from ssl_geometry.callbacks.evaluation import EvaluateAtStart
from ssl_geometry.callbacks.finite import StopOnNaN
from ssl_geometry.callbacks.interruption import LastCheckpoint, LostProcess, StopOnSignal, a_reader_ended
from ssl_geometry.callbacks.invariance import InvarianceMonitor
from ssl_geometry.callbacks.loggers import LoggerName, ResumableWandbLogger, make_loggers
from ssl_geometry.callbacks.neighbors import NeighborhoodMonitor
from ssl_geometry.callbacks.probes import ProbeMonitor
from ssl_geometry.callbacks.processes import Status, WatchProcesses
from ssl_geometry.callbacks.progress import FitProgress
from ssl_geometry.callbacks.records import FlushRecords, LogEveryEpoch, RecordsLogger
from ssl_geometry.callbacks.seeding import SeedSteps
from ssl_geometry.callbacks.spectrum import SpectrumMonitor

__all__ = [
    "CKAMonitor",
    "EvaluateAtStart",
    "FitProgress",
    "FlushRecords",
    "InvarianceMonitor",
    "LastCheckpoint",
    "LogEveryEpoch",
    "LoggerName",
    "LostProcess",
    "NeighborhoodMonitor",
    "ProbeMonitor",
    "RecordsLogger",
    "ResumableWandbLogger",
    "SeedSteps",
    "SpectrumMonitor",
    "Status",
    "StopOnNaN",
    "StopOnSignal",
    "WatchProcesses",
    "a_reader_ended",
    "make_loggers",
]
