"""uint8 pixels -> normalised patches in the encoder's format, in one sweep."""

from megavlm_kernels.normalise_patchify.op import patches_of_pictures, patches_of_tiles

__all__ = ["patches_of_pictures", "patches_of_tiles"]
