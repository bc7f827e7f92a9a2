"""What a reader must know of a published number before comparing with it: footnotes of the rows of published.csv that they concern.

Each says which rows it is about by patterns (fnmatch) over their fields. "(inferred)" marks a reading that the source does not state.
"""

from __future__ import annotations

from dataclasses import dataclass

from results.reference.published import Published


@dataclass(frozen=True)
class Remark:
    """A footnote and the rows that it is about."""

    text: str
    paper: str = "*"
    table: str = "*"
    method: str = "*"
    variant: str = "*"
    backbone: str = "*"
    eval: str = "*"
    metric: str = "*"

    def concerns(self, row: Published) -> bool:
        """Whether it is about a row."""
        return row.fits(paper=self.paper, table=self.table, method=self.method, variant=self.variant, backbone=self.backbone, eval=self.eval,
                        metric=self.metric)


REMARKS: tuple[Remark, ...] = (
    # BEiT: which BEiT, which head, which probe
    Remark("BEiT here is the plain ViT of BEiT's own paper; the BEiT of MAE Tables 4 and 5 is another one (re-trained with the released code: relative "
           "bias and LayerScale)", "MAE", "3", "BEiT"),
    Remark("BEiT here was re-trained by MAE's authors with the released code (relative bias and LayerScale, inferred); the BEiT of MAE Table 3 is another "
           "one (the plain ViT of BEiT's paper)", "MAE", "[45]", "BEiT"),
    Remark("BEiT's epochs are not restated in this table: 800 is inferred", "MAE", "5", "BEiT"),
    Remark("SETR-PUP head, whose code was not released: not comparable with UperNet, by which the same pre-training gets other values (BEiT Table 5, MAE "
           "Table 5)", "BEiT", eval="ADE20K-SETRPUP-ss"),
    Remark("UperNet head: Tables 3, 4 and 10 of the same paper use SETR-PUP", "BEiT", "5", eval="ADE20K-*"),
    Remark("the paper does not say which weights the supervised row stands on", "BEiT", "3", "supervised"),
    Remark("the paper speaks of 40 % masked; its code hides at most 75 of 196 patches, 38.0 % on average", "BEiT", "4", variant="default-*"),
    Remark("neither paper nor code says which regression loss was used and whether the pixels were normalised", "BEiT", "4", variant="pixel-target*"),
    Remark("intermediate fine-tuning means fine-tuning on ImageNet-1K first, not on ImageNet-22k", variant="*interm-IN1K-ft"),
    Remark("probed at the best middle layer (9 of ViT-B, 14 of ViT-L) on average-pooled patches; MAE Table 12 has 52.1 for ViT-L by MAE's protocol. The "
           "epochs are not restated: 800 is inferred", "BEiT", "9", "BEiT"),
    Remark("MAE's probing protocol, in the implementation of MAE's authors; BEiT's own paper has 73.5 for ViT-L by another protocol. Which BEiT this is, is "
           "not stated", "MAE", "12", "BEiT"),
    # others as quoted by BEiT and MAE
    Remark("likely copied from another row of the table (87.1 is ViT384-B's supervised value): MoCo v3's own repository reports 90.5", "BEiT", "11",
           "MoCo-v3"),
    Remark("the BERT objective at 32x32 pixels; this table gives its resolution as 224. Autoregressive iGPT-L has 66.3 (32x32) and 72.6 (48x48)", "BEiT",
           "1", "iGPT"),
    Remark("the paper does not say of how many epochs; 76.7 is the 600-epoch value of MoCo v3's paper", "BEiT", "9", "MoCo-v3", backbone="ViT-B/16"),
    Remark("from DINO's own Table 6, a long recipe in DeiT's style: fine-tuned otherwise than its neighbours", "[BM]*", "*", "DINO", eval="IN1K-ft-224"),
    Remark("400 epochs: stated by BEiT's Table 10", "BEiT", "*", "DINO", eval="IN1K-linear"),
    Remark("another architecture at another resolution: 76 million (S) to 6.8 billion (XL) parameters, a token for each pixel of an image of 32 to 64 pixels "
           "(MR); the method igpt is its objective on our ViT, and is not compared with it", method="iGPT", variant="*MR*"),
    Remark("iGPT-L on the input of a VQVAE; on pixels its own paper has 65.2 (48x48) and 60.3 (32x32)", "MAE", "12", "iGPT", backbone="iGPT-L"),
    # MAE: which MAE
    Remark("unnormalised pixels, 800 epochs, unless the row says otherwise; the released weights (normalised pixels, 1600 epochs) have 85.9", "MAE",
           "1[abcef]", "MAE"),
    Remark("800 epochs: with 1600 the normalised target has 85.9 and the unnormalised one 85.1", "MAE", "1d", "MAE", "target-pixel-*", eval="IN1K-ft-224"),
    Remark("the number of epochs is not restated: 1600 is inferred from the normalised row, which equals Table 3's", "MAE", "7"),
    Remark("the text of section 4 has 82.5", "MAE", "3", "scratch", backbone="ViT-L/16"),
    Remark("weights averaged over training (EMA); without it 82.1, 81.5 and 80.9", "MAE", "3", "scratch"),
    Remark("no recipe for 448 pixels was published", "MAE", eval="*-448"),
    Remark("learning rate and epochs were adjusted for each data set and never published", "MAE", "6"),
    Remark("from TensorFlow; the PyTorch repository has 67.8, 76.0 and 77.2", "MAE", "12", "MAE"),
    Remark("estimated, not run", "MAE", "2", variant="*-estimated"),
    # MAE: dense transfer and robustness
    Remark("the setting of Li et al. 2021 (four taps and FPN), not that of ViTDet, which has 51.6 / 45.9 for ViT-B; learning rate, weight decay, drop path "
           "and epochs were searched for every entry", "MAE", "[47]", eval="COCO-*"),
    Remark("the weights that DeiT released (300 epochs)", "MAE", "4", "supervised", "DeiT-weights"),
    Remark("the paper does not say which supervised weights these are", "MAE", "5", "supervised"),
    Remark("100 epochs at batch 16 by the paper's text, with the learning rate searched for every entry; public reproductions of 48.1 train 160,000 "
           "iterations (126.7 epochs)", "MAE", "[57]", eval="ADE20K-*"),
    Remark("mean corruption error normalised by AlexNet's: lower is better", "MAE", "13", metric="mCE"),
    Remark("the same weights re-evaluated elsewhere differ by up to 0.9", "MAE", "13", eval="IN-A*"),
)


def remarks_on(row: Published) -> tuple[str, ...]:
    """The footnotes of a row, in the order above."""
    return tuple(r.text for r in REMARKS if r.concerns(row))
