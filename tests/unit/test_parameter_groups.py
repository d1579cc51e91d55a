"""Which parameters have weight decay: matrices and kernels, less what a network names."""

import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from ssl_geometry.methods import Method, SimCLR


def undecayed(method: Method) -> set[str]:
    """Names of the parameters without weight decay; each that is trained is in one group of the optimiser."""
    optimizer = method.build_optimizer(0.1)
    names = {id(parameter): name for name, parameter in method.named_parameters() if parameter.requires_grad}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    assert set(decay.values()) <= {0.0, method.hparams["weight_decay"]}
    return {name for name, value in decay.items() if value == 0}


def test_a_resnet_decays_its_kernels_and_matrices() -> None:
    method = SimCLR(backbone="resnet10", width=0.25, weight_decay=0.5)
    assert undecayed(method) == {name for name, parameter in method.named_parameters() if parameter.ndim == 1}


def test_a_vision_transformer_keeps_its_tokens_and_positions_as_timm_does() -> None:
    method = SimCLR(backbone="vit_tiny_patch16_224", image_size=32, weight_decay=0.5, optimizer="adamw")
    spared = undecayed(method)
    assert {"backbone.cls_token", "backbone.pos_embed"} <= spared
    net = method.backbone
    without, _ = param_groups_weight_decay(net, 0.5, no_weight_decay_list=net.no_weight_decay())
    ids = {id(parameter) for parameter in without["params"]}
    assert {name for name in spared if name.startswith("backbone.")} == {
        f"backbone.{name}" for name, parameter in net.named_parameters() if id(parameter) in ids
    }


def test_names_are_found_where_a_module_gives_them_and_frozen_parameters_are_left_out() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt, self.table = nn.Parameter(torch.zeros(1, 2, 4)), nn.Parameter(torch.zeros(3, 4))

        def no_weight_decay(self) -> set[str]:
            return {"prompt"}

    method = Method(backbone="resnet10", width=0.25, weight_decay=0.5)
    method.head = nn.Sequential(Tokens(), nn.Linear(4, 4))
    method.head[1].weight.requires_grad_(False)
    spared = undecayed(method)
    assert {"head.0.prompt", "head.1.bias"} <= spared
    assert "head.0.table" not in spared


def test_swin_keeps_its_tables_of_relative_positions() -> None:
    method = Method(backbone="resnet10", width=0.25)
    method.backbone = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2)
    )
    tables = {name for name, _ in method.named_parameters() if name.endswith("relative_position_bias_table")}
    assert tables
    assert tables <= undecayed(method)
