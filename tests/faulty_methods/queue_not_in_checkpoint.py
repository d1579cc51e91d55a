"""The queue is an attribute: a resumed run begins with another one."""

from torch import Tensor

from tests.faulty_methods.working import Queued


class Faulty(Queued):
    def keep(self, queue: Tensor) -> None:
        self.queue = queue
