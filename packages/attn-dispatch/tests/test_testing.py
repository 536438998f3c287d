import torch
from attn_dispatch import AttentionHandler, SdpaMode
from attn_dispatch.testing import RecordingHandler, TinyDiT


def test_a_recording_handler_remembers() -> None:
    handler = RecordingHandler()
    assert isinstance(handler, AttentionHandler)
    handler.begin_run()
    model = TinyDiT(double=1, single=2)
    with SdpaMode(handler):
        model(**model.example(4, 5))
    handler.end_run()
    assert [tuple(call.q.shape) for call in handler.calls] == [(1, 2, 25, 16)] * 3
    assert (handler.begun, handler.ended) == (1, 1)


def test_weights_and_inputs_depend_on_seeds_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = TinyDiT(seed=1), TinyDiT(seed=1), TinyDiT(seed=2)
    out = first(**first.example(4, 5))
    assert torch.equal(out, again(**again.example(4, 5)))
    assert not torch.equal(out, other(**other.example(4, 5)))
    torch.set_rng_state(state)


def test_logits_spread_as_in_a_trained_model() -> None:
    handler = RecordingHandler()
    model = TinyDiT()
    with torch.no_grad(), SdpaMode(handler):
        model(**model.example(8, 8))
    for call in handler.calls:
        logits = call.q @ call.k.transpose(-1, -2) / call.q.shape[-1] ** 0.5
        assert 1.0 < float(logits.std()) < 4.0


def test_positions_matter() -> None:
    model = TinyDiT()
    inputs = model.example(4, 4)
    moved = {**inputs, "img_ids": inputs["img_ids"] + torch.tensor([0.0, 3.0, 0.0]) * (inputs["img_ids"][:, 1:2] > 1)}
    assert not torch.allclose(model(**inputs), model(**moved), atol=1e-3)
