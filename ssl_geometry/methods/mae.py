"""MAE: an encoder sees a quarter of an image's patches, and a small decoder the pixels of the others."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from ssl_geometry.data.random_numbers import uniform
from ssl_geometry.data.views import ViewSpec
from ssl_geometry.errors import UserError
from ssl_geometry.methods.base import Backbone, Batch, Decay, Method, Optimizer, Rate, Share
from ssl_geometry.ranges import at_least, check_arguments

VIEWS = [ViewSpec(augment=[{"crop": {"scale": [0.2, 1.0]}}, "flip"])]
HEAD = 32


class MAE(Method):
    """Masked autoencoder of one of timm's vision transformers, with the optimiser of the paper.

    Args:
        backbone: a ViT of timm without layers after its pooling; ``patch_size`` sets patches of 4 pixels for CIFAR.
        mask_ratio: share of the patches that the encoder does not see: at least one, and not all.
        decoder_dim: width of the decoder, a multiple of 32: its attention heads are 32 wide.
        decoder_depth: blocks of the decoder.
        views: how the images are augmented.
        optimizer: lars, sgd or adamw.
        lr: learning rate for a global batch of 256 images.
        weight_decay: not applied to biases, normalisation layers, tokens and position embeddings.
        betas: of adamw.

    References:
        He et al., *Masked autoencoders are scalable vision learners*, 2022, section 3 and appendix A.1.
    """

    learns_from_labels = steps_show_images = False
    compiled_parts = ("backbone.blocks", "decoder.blocks")

    def __init__(
        self,
        backbone: Backbone = "vit_tiny_patch16_224",
        mask_ratio: Share = 0.75,
        decoder_dim: Annotated[int, at_least(HEAD)] = 512,
        decoder_depth: Annotated[int, at_least(1)] = 8,
        views: list[ViewSpec] = VIEWS,
        optimizer: Optimizer = "adamw",
        lr: Rate = 1.5e-4,
        weight_decay: Decay = 0.05,
        betas: tuple[Share, Share] = (0.9, 0.95),
        **kwargs: Any,
    ) -> None:
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM

        check_arguments(MAE, {k: v for k, v in locals().items() if k != "backbone"}, "--model.")
        recipe: Any = {"optimizer": optimizer, "lr": lr, "weight_decay": weight_decay, "betas": betas}
        super().__init__(backbone=backbone, views=views, **recipe, **kwargs)
        vit: Any = self.backbone
        if not isinstance(getattr(vit, "fc_norm", None), nn.Identity) or vit.attn_pool is not None:
            raise UserError(
                f"--model.backbone {self.hparams['backbone']}: MAE takes ViTs that pool last, as vit_tiny_patch16_224"
            )
        if decoder_dim % HEAD:
            raise UserError(f"--model.decoder_dim {decoder_dim}: expected a multiple of {HEAD}, the width of a head")
        # in a tuple, so that it registers neither the backbone again nor a mask token that nothing would train
        self.encoder = (MaskedVisionTransformerTIMM(vit, weight_initialization="skip"),)
        self.patch_size, self.prefix = vit.patch_embed.patch_size[0], vit.num_prefix_tokens
        self.patches = (self.view.size // self.patch_size) ** 2
        if self.patches < 2:
            raise UserError(f"--model.patch_size {self.patch_size}: a view is one patch; set patches of fewer pixels")
        self.visible = min(max(round((1 - mask_ratio) * self.patches), 1), self.patches - 1)
        self.decoder_embed = nn.Linear(self.num_features, decoder_dim)
        size = (decoder_dim, decoder_depth, decoder_dim // HEAD)
        self.decoder = MaskedVisionTransformerDecoderTIMM(self.patches, *size, num_prefix_tokens=self.prefix)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * self.patch_size**2)

    def no_weight_decay(self) -> set[str]:
        """The mask token, by timm's convention."""
        return {"decoder.mask_token"}

    def order(self, index: Int64[Tensor, " B"]) -> Int64[Tensor, "B P"]:
        """Prefix tokens, then the visible patches, then the masked ones: a function of (seed, epoch, index)."""
        u = uniform(index, seed=self.hparams["seed"], epoch=self.current_epoch, view=0, stream="mask", n=self.patches)
        return F.pad(u, (self.prefix, 0), value=-1.0).argsort(dim=1, stable=True)

    def outputs(self, views: Any, batch: Batch) -> tuple[Tensor, ...]:
        """Predicted and true pixels of the masked patches; attention does not mind the order of the tokens."""
        order, seen = self.order(batch["index"]), self.prefix + self.visible
        tokens = self.decoder_embed(self.encoder[0].encode(self._in_format(views[0]), idx_keep=order[:, :seen]))
        unknown = self.decoder.mask_token.to(tokens.dtype).expand(len(order), self.patches - self.visible, -1)
        decoded = self.decoder.decode(torch.cat([tokens, unknown], 1) + self.decoder.pos_embed[0][order])[:, seen:]
        pixels = F.pixel_unshuffle(views[0], self.patch_size).flatten(2).mT
        return self.decoder_pred(decoded), pixels.take_along_dim((order[:, seen:] - self.prefix)[..., None], 1)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Squared error of the masked patches, each of which is standardised."""
        predicted, pixels = outputs
        var, mean = torch.var_mean(pixels, 2, keepdim=True)
        return (predicted - (pixels - mean) / (var + 1e-6).sqrt()).square().mean()
