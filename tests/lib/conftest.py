import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Tensors and layers are float64 unless they say otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def one_thread():
    """What was computed on one thread is computed again on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """How many vectors each call of autograd.grad was given."""
    counted, original = [], torch.autograd.grad

    def counting(outputs, inputs, grad_outputs=None, *args, **kwargs):
        batched = kwargs.get("is_grads_batched", False)
        counted.append(len(grad_outputs) if batched else 1)
        return original(outputs, inputs, grad_outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    return counted
