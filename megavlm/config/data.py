"""The recipe's `data` block: sources, pictures, conversations, packing budgets; and what stages say about data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from megavlm.config.blocks import Block, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

CHAT_TEMPLATES = ("megavlm", "chatml", "llava-v1", "llama3", "plain", "paligemma", "blip-2")
"""Named conversation formats; megavlm.data.chat holds them."""

Interpolation = Literal["bicubic", "bilinear", "lanczos"]


class SourceConfig(Block):
    """One data set: a folder of shards."""

    path: str
    """Folder holding shard-*.tar files (see docs/data.md), on a disk or in an object store (s3://, gs://, ...)."""
    split: str = "train"
    """Only samples whose metadata says this split; the index refuses a split that has no sample."""
    tasks: list[str] | None = None
    """Only samples of these tasks; None: all."""
    loss_weight: NonNegativeFloat = 1.0
    """Loss weight of every target of this source, times the sample's own and the task's."""


class PictureMarks(Block):
    """What stands round and between the visual tokens of a picture in the text, as a family's Hugging Face processor writes it."""

    written: str = ""
    """The token that the chat template writes for a picture, where that is not data.image_token (Gemma 3: <start_of_image>)."""
    before: str = ""
    """Text before a picture (InternVL: <img>)."""
    after: str = ""
    """Text behind it (InternVL: </img>)."""
    merge: bool = False
    """Where two pictures meet, what stands behind the first and before the second is written once (Idefics2)."""
    word_space: bool = False
    """Behind `after`, a space where a word follows directly (Idefics2)."""
    row_end: str = ""
    """native: behind each row of visual tokens but the last (Pixtral: [IMG_BREAK])."""
    last_row_end: str = ""
    """native: behind the last row (Pixtral: [IMG_END])."""
    tile_before: str = ""
    """split: before each tile of a picture that was cut; {row} and {column} count from 1 (Idefics3)."""
    tile_row_end: str = ""
    """split: behind each row of tiles."""
    whole_before: str = ""
    """split: before the tile that shows the whole picture."""
    single_before: str = ""
    """split: before the only tile of a picture that was not cut."""

    @property
    def inner(self) -> bool:
        """Is there anything between the visual tokens of one picture?"""
        return any((self.row_end, self.last_row_end, self.tile_before, self.tile_row_end, self.whole_before, self.single_before))


class ImageConfig(Block):
    """From a picture to what the encoder sees. The side of a tile comes from model.vision.image_size_px."""

    policy: Literal["fixed", "tiles", "anyres", "split", "canvas", "native"] = "fixed"
    """fixed: one tile a picture. tiles: a grid of tiles of the nearest aspect ratio (InternVL). anyres: the grid that keeps most
    of the picture, padded, with the whole picture as first tile (LLaVA-NeXT). split: scaled to `longest_edge_px`, stretched to whole
    tiles, cut, with the whole picture as last tile (Idefics3). canvas: the grid on which the picture is largest, black around it, for an
    encoder with model.vision.canvas (Llama 3.2 Vision). native: the picture's own size in whole patches (Qwen2-VL, Pixtral)."""
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    """fixed only. stretch: to the square (SigLIP). crop: shortest side to the tile's, centre cut out (CLIP). pad: to a square with the
    encoder's mean colour (LLaVA)."""
    interpolation: Interpolation = "bicubic"
    """How pictures are resized, antialiased in each case. canvas, where nothing is said: bilinear (Llama 3.2 Vision). Gemma 3 and Idefics2
    learned bilinear pictures, Idefics3 and SmolVLM lanczos ones, which Pillow makes in some ten times the time."""
    min_tiles: PositiveInt = 1
    """tiles only: fewest tiles of one picture."""
    max_tiles: PositiveInt = 1
    """tiles only: most tiles of one picture, thumbnail not counted."""
    thumbnail: bool = False
    """tiles only: add the whole picture as one more tile when it was cut into several."""
    anyres_grids: list[tuple[PositiveInt, PositiveInt]] = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    """anyres only: grids to choose from, (rows, columns) of tiles; Hugging Face's image_grid_pinpoints divided by the tile's side."""
    longest_edge_px: PositiveInt | None = None
    """split: every picture's longest side becomes this long before it is cut. native: longer sides are shrunk to it, both alike; None:
    they are not (Pixtral, Idefics2)."""
    shortest_edge_px: PositiveInt | None = None
    """native only: sides that are shorter after that are stretched to it (Idefics2)."""
    whole_patches: Literal["nearest", "stretch", "cut"] = "nearest"
    """native only. nearest: sides are scaled to the nearest number of patches (Qwen2-VL). stretch: to the next (Pixtral). cut: what is
    beyond the last whole patch is cut off (Idefics2)."""
    anyres_several: Literal["alike", "whole"] = "alike"
    """anyres only: pictures of a sample with more than one. alike: each in its own grid (LLaVA-NeXT); whole: each is one tile, padded to
    a square with the encoder's mean colour (LLaVA-OneVision)."""
    anyres_max_tiles: PositiveInt | None = None
    """anyres only: where a picture has the features of more than 1.2 times as many tiles, they are shrunk to those of this many
    (LLaVA-OneVision: 9). None: never."""
    min_tokens_per_image: PositiveInt = 4
    """native only: smaller pictures are enlarged to this many visual tokens."""
    max_tokens_per_image: PositiveInt | None = None
    """Visual tokens of one picture: above it, its resolution is lowered. None: no cap (native: 16384, Qwen2-VL's)."""
    max_tokens_per_sample: PositiveInt | None = None
    """Visual tokens of all pictures of a sample: above it, the resolution of all is lowered. No picture is ever left out."""
    marks: PictureMarks = Field(default_factory=PictureMarks)
    """Tokens round a picture's visual tokens; init.from_hf and `megavlm convert` take them from the family."""
    decoder: Literal["auto", "pillow", "nvimgcodec"] = "auto"
    """auto: nvImageCodec when a GPU can be used, else Pillow."""

    @model_validator(mode="after")
    def _check(self) -> ImageConfig:
        if self.policy == "canvas" and "interpolation" not in self.model_fields_set:
            self.interpolation = "bilinear"
        foreign = {
            "tiles": {"min_tiles": self.min_tiles != 1, "max_tiles": self.max_tiles != 1, "thumbnail": self.thumbnail},
            "fixed": {"fit": self.fit != "stretch"},
            "anyres": {
                "anyres_grids": self.anyres_grids != ImageConfig.model_fields["anyres_grids"].default,
                "anyres_several": self.anyres_several != "alike",
                "anyres_max_tiles": self.anyres_max_tiles is not None,
            },
            "native": {
                "min_tokens_per_image": self.min_tokens_per_image != ImageConfig.model_fields["min_tokens_per_image"].default,
                "shortest_edge_px": self.shortest_edge_px is not None,
                "whole_patches": self.whole_patches != "nearest",
            },
        }
        for policy, fields in foreign.items():
            if policy != self.policy and (named := [name for name, is_set in fields.items() if is_set]):
                raise ValueError(f"{', '.join(named)} goes with policy={policy}, not {self.policy}")
        if self.longest_edge_px is not None and self.policy not in ("split", "native"):
            raise ValueError(f"longest_edge_px goes with policy=split or native, not {self.policy}")
        if self.longest_edge_px is None and self.policy == "split":
            raise ValueError("policy=split scales pictures to longest_edge_px before it cuts them: give it (Idefics3: four tiles' sides)")
        if self.shortest_edge_px is not None and self.longest_edge_px is not None and self.shortest_edge_px > self.longest_edge_px:
            raise ValueError(f"shortest_edge_px={self.shortest_edge_px} exceeds longest_edge_px={self.longest_edge_px}")
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles={self.min_tiles} exceeds max_tiles={self.max_tiles}")
        rows, tiles = (
            (self.marks.row_end, self.marks.last_row_end),
            (self.marks.tile_before, self.marks.tile_row_end, self.marks.whole_before),
        )
        if any(rows) and self.policy != "native":
            raise ValueError(f"marks.row_end and last_row_end go with policy=native, not {self.policy}")
        if (any(tiles) or self.marks.single_before) and self.policy != "split":
            raise ValueError(f"marks.tile_before, tile_row_end, whole_before and single_before go with policy=split, not {self.policy}")
        if not self.anyres_grids:
            raise ValueError("anyres_grids is empty: give at least one (rows, columns)")
        if self.max_tokens_per_image is not None and self.policy == "native" and self.min_tokens_per_image > self.max_tokens_per_image:
            raise ValueError(f"min_tokens_per_image={self.min_tokens_per_image} exceeds max_tokens_per_image={self.max_tokens_per_image}")
        return self


class DataConfig(Block):
    """Sources, sequence and packing budgets, conversation format."""

    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    tokenizer: str = ""
    """A SentencePiece model file (*.model) or a Hugging Face folder with tokenizer.json."""
    chat_template: str = "megavlm"
    """Named conversation format (megavlm, chatml, llava-v1, llama3, plain, paligemma, blip-2), "tokenizer" for the Hugging Face tokenizer's
    own, or a *.jinja file; see docs/data.md."""
    image_token: str = "<image>"
    """The tokenizer's special token that visual features replace (Qwen: <|image_pad|>). In the data a picture's place is always written
    <image>."""
    instruction_tokenizer: str | None = None
    """A Hugging Face folder with the tokenizer.json of model.projector.qformer.instruction (InstructBLIP: its qformer_tokenizer)."""
    image: ImageConfig = Field(default_factory=ImageConfig)
    seq_len_tokens: PositiveInt = 4096
    """Length of a pack: a hard budget on LLM tokens, visual tokens included."""
    pack_window_samples: PositiveInt = 256
    """Samples waiting for a place; the packer fills each pack from these."""
    max_patches_per_pack: PositiveInt | None = None
    """Budget on vision work: patches of all pictures of one pack; None: no limit."""
    patch_budget: Literal["hard", "target"] = "hard"
    """hard: never more than max_patches_per_pack. target: more only where the pack would otherwise not be full."""
    over_long: list[Literal["lower_resolution", "split_turns", "drop"]] = []
    """What to do, in this order, with a sample that fits no pack: lower its pictures' resolution, split it between turns, leave
    it out and count it. If it still does not fit, the index is refused."""
    unusable: Literal["refuse", "drop"] = "refuse"
    """A sample that can never be used: its JSON or a file of it is wrong, its text holds a special token, a picture's shape is none the
    policy takes. refuse: no index is made. drop: it is left out, counted, and listed with the reason beside the index."""
    packing: bool = True
    """False: one sample per sequence (for comparison)."""
    workers: Literal["threads", "processes"] = "threads"
    """What decodes and tokenises ahead. Processes use more cores than Python's threads can; a killed one is replaced."""
    num_workers: NonNegativeInt = 1
    """Workers of each rank; 0: in the training thread."""
    prefetch_steps: PositiveInt = 2
    """Steps kept ready ahead of the training thread."""
    max_bad_fraction: Fraction = 0.01
    """Stop when more than this share of the samples so far could not be read."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.patch_budget == "target" and self.max_patches_per_pack is None:
            raise ValueError("patch_budget=target goes with max_patches_per_pack: without it there is no budget to aim at")
        return self

    @field_validator("chat_template")
    @classmethod
    def _known_template(cls, name: str) -> str:
        if name not in CHAT_TEMPLATES and name != "tokenizer" and not name.endswith(".jinja"):
            raise ValueError(f'{name!r} is none of {", ".join(CHAT_TEMPLATES)}, nor "tokenizer", nor a *.jinja file')
        return name


class MixtureEntry(Block):
    """One source's part in a stage."""

    weight: NonNegativeFloat | dict[NonNegativeInt, NonNegativeFloat] | None = None
    """Share of samples, beside the other sources' weights; or weights at steps of the stage: {0: 1.0, 500: 0.2}."""
    change: Literal["linear", "steps"] = "linear"
    """Between the steps named in weight: along a straight line, or a jump at each."""
    repeats: PositiveFloat | None = None
    """Instead of a weight: how often each of its samples is seen while the others are seen as often as they say. With repeats=1
    everywhere, every sample is seen exactly once an epoch."""
    max_epochs: PositiveFloat | None = None
    """After so many passes the source gives nothing more and its share goes to the others; None: no cap."""

    @property
    def is_used(self) -> bool:
        """Whether it is drawn from at some step."""
        if self.repeats is not None:
            return True
        return any(self.weight.values()) if isinstance(self.weight, dict) else bool(self.weight)

    @model_validator(mode="after")
    def _check(self) -> MixtureEntry:
        if (self.weight is None) == (self.repeats is None):
            raise ValueError("give either weight or repeats")
        if isinstance(self.weight, dict) and not self.weight:
            raise ValueError("weight names no step: give {0: ...}")
        return self


class LossConfig(Block):
    """How the losses of single tokens become the loss."""

    averaging: Literal["token", "sample", "square"] = "token"
    """token: every target counts the same. sample: every sample (a target counts 1/n of its sample's n). square: 1/sqrt(n), between
    the two (InternVL's loss_reduction)."""
    task_weights: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Loss weight of each task; tasks not named count 1."""
    z_loss: NonNegativeFloat = 0.0
    """Adds this x log(Z)^2 to each target's loss, where Z is the denominator of the softmax over the vocabulary: logits do not drift
    (PaLM takes 1e-4, https://arxiv.org/abs/2204.02311, section 5). Reported apart, as z_loss: `loss` stays the cross-entropy."""
