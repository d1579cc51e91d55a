"""Does a method hold what every method must? Trained for seconds on the CPU, without a line of its author's."""

from ssl_geometry.conformance.kit import CHECKS, check_method
from ssl_geometry.conformance.trial import small_options
from ssl_geometry.conformance.verdict import Verdict

__all__ = ["CHECKS", "Verdict", "check_method", "small_options"]
