"""Methods: one LightningModule a file. Subclass :class:`Method` and give ``loss``."""

from ssl_geometry.methods.barlow_twins import BarlowTwins
from ssl_geometry.methods.base import Method
from ssl_geometry.methods.byol import BYOL
from ssl_geometry.methods.dino import DINO
from ssl_geometry.methods.lejepa import LeJEPA
from ssl_geometry.methods.mae import MAE
from ssl_geometry.methods.moco_v2 import MoCoV2
from ssl_geometry.methods.moco_v3 import MoCoV3
from ssl_geometry.methods.parts.gather import gathered
from ssl_geometry.methods.parts.queue import Queue
from ssl_geometry.methods.parts.teacher import Teacher
from ssl_geometry.methods.published import Published
from ssl_geometry.methods.simclr import SimCLR
from ssl_geometry.methods.simsiam import SimSiam
from ssl_geometry.methods.supcon import SupCon
from ssl_geometry.methods.supervised import Supervised
from ssl_geometry.methods.swav import SwAV
from ssl_geometry.methods.vicreg import VICReg

__all__ = [
    "BYOL",
    "DINO",
    "MAE",
    "BarlowTwins",
    "LeJEPA",
    "Method",
    "MoCoV2",
    "MoCoV3",
    "Published",
    "Queue",
    "SimCLR",
    "SimSiam",
    "SupCon",
    "Supervised",
    "SwAV",
    "Teacher",
    "VICReg",
    "gathered",
]
