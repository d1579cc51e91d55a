"""LARS: momentum SGD whose step in each layer is scaled by the ratio of the norms of weights and gradient."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """The numbers and the state of ``lightly.utils.lars.LARS``, without its loop and its waits.

    lightly reads two norms of each parameter on the host; here they stay on the device, all parameters of a group go
    through one ``foreach`` operation at a time, and a fill stands for the branch. (One product per decayed parameter is
    left: torch has no ``foreach`` kernel for a factor on the device for each tensor.)

    With decay w, trust coefficient c, momentum m and learning rate l, a parameter p with gradient g takes
    ``d = c |p| / (|g| + w |p| + eps) (g + w p)``, ``v = m v + (1 - dampening) d``, ``p = p - l v``. Where p is zero,
    d = g; where g is zero, d = 0. Groups without weight decay are not scaled: d = g.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate.
        momentum: 0 keeps no state.
        dampening: of the momentum, from the second step on.
        weight_decay: L2 penalty; 0 switches the scaling off as well.
        nesterov: Nesterov momentum.
        trust_coefficient: c above.
        eps: added to the denominator.

    Raises:
        ValueError: a negative option, or Nesterov momentum without momentum or with dampening.

    References:
        You, Gitman & Ginsburg, *Large batch training of convolutional networks*, 2017.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> weight.grad = torch.tensor([0.0, 2.0])
        >>> LARS([weight], lr=1.0, weight_decay=0.1, trust_coefficient=0.25).step()
        >>> weight.data  # less 0.25 x 5 / (2 + 0.1 x 5) x (0.3, 2.4)
        tensor([2.8500, 2.8000])
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} is {value}, expected 0 or more")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and no dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient.

        Args:
            closure: computes the gradients again.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.device, parameter.dtype].append(parameter)
            for parameters in alike.values():
                self._step(parameters, group)
        return loss

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Parameters of one device and dtype, which is what ``foreach`` kernels take together."""
        updates = [parameter.grad for parameter in parameters if parameter.grad is not None]  # as many
        if decay := group["weight_decay"]:
            p_norm, g_norm = _norms(parameters), _norms(updates)
            rate = p_norm / (g_norm + p_norm * decay + group["eps"]) * group["trust_coefficient"]
            rate = rate.masked_fill(p_norm == 0, 1.0).masked_fill(g_norm == 0, 0.0)
            updates = list(torch._foreach_add(updates, parameters, alpha=decay))
            torch._foreach_mul_(updates, list(rate.unbind()))
        if momentum := group["momentum"]:
            known, into = [], []
            for parameter, update in zip(parameters, updates, strict=True):
                state = self.state[parameter]
                if "momentum_buffer" in state:
                    known.append(state["momentum_buffer"])
                    into.append(update)
                else:
                    state["momentum_buffer"] = update.clone()
            if known:
                torch._foreach_mul_(known, momentum)
                torch._foreach_add_(known, into, alpha=1 - group["dampening"])
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            updates = list(torch._foreach_add(updates, buffers, alpha=momentum)) if group["nesterov"] else buffers
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def _norms(tensors: list[Tensor]) -> Tensor:
    """(number of tensors,), in float32 at least: a norm of half-precision numbers rounds and overflows in their own."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype))
