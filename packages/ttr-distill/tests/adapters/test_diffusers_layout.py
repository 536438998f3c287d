from collections.abc import Callable

import pytest
import torch
from attn_dispatch import TokenLayout
from attn_kernels import TokenGrid
from torch import Tensor
from ttr_distill.adapters.diffusers_layout import LayoutReader, latent_grid, read_grids

IdsMaker = Callable[..., Tensor]


def test_a_latent_image_is_cut_into_patches() -> None:
    image, text = torch.zeros(2, 4, 6, 10), torch.zeros(2, 7, 8)
    inputs = {"hidden_states": image, "encoder_hidden_states": text}
    alone = TokenLayout(15, (), (TokenGrid(0, 3, 5),))
    joint = TokenLayout(22, ((15, 22),), (TokenGrid(0, 3, 5),))
    assert LayoutReader("SD3Transformer2DModel", 2, None).layouts(inputs) == (alone, joint)
    assert LayoutReader("Other", 2, None).layouts(inputs) == (alone,), "where the text lies is not guessed"
    assert LayoutReader("Other", 4, None).layouts(inputs) == ()
    assert LayoutReader("Other", None, None).layouts(inputs) == ()
    assert LayoutReader("Other", 2, None).layouts({"hidden_states": torch.zeros(2, 15, 8)}) == ()


def test_ids_are_read_once_per_tensor(fractional_ids: IdsMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def counted(ids: Tensor) -> tuple[TokenGrid, ...]:
        reads.append(ids)
        return read_grids(ids)

    monkeypatch.setattr("ttr_distill.adapters.diffusers_layout.read_grids", counted)
    reader = LayoutReader("FluxTransformer2DModel", 1, None)
    ids = fractional_ids(3, 4)
    inputs = {"hidden_states": torch.zeros(1, 12, 8), "encoder_hidden_states": torch.zeros(1, 5, 8), "img_ids": ids}
    expected = (TokenLayout(17, ((0, 5),), (TokenGrid(5, 3, 4),)),)
    assert reader.layouts(inputs) == reader.layouts(inputs) == expected
    assert len(reads) == 1
    reader.forget()
    assert reader.layouts(inputs) == expected
    assert len(reads) == 2


def test_grids_are_rasters_or_nothing(fractional_ids: IdsMaker) -> None:
    two = torch.cat([fractional_ids(3, 4), fractional_ids(2, 5, image=1.0)])
    assert read_grids(two) == (TokenGrid(0, 3, 4), TokenGrid(12, 2, 5))
    assert read_grids(two[None]) == read_grids(two)
    for broken in (
        two[:11],
        two[torch.randperm(22, generator=torch.Generator().manual_seed(0))],
        two[:, :2],
        two[:0],
        two[0],
    ):
        assert read_grids(broken) == ()


def test_a_latent_of_square_patches_fits_or_is_named() -> None:
    assert latent_grid((8, 12), 24) == TokenGrid(0, 4, 6)
    assert latent_grid((4, 6), 24) == TokenGrid(0, 4, 6)
    for size, tokens in (((8, 12), 25), ((3, 3), 36), ((9, 8), 18), ((4, 4), 0)):
        with pytest.raises(ValueError, match=f"does not fit {tokens} image tokens"):
            latent_grid(size, tokens)
