"""What makes a CPU fast: products with weights packed for oneDNN, and bfloat16 where it pays."""
import platform

import torch
import torch.nn as nn

class PackedLinear(nn.Linear):
    """nn.Linear that multiplies by a copy of its weight in oneDNN's own layout, which is faster for
    a few rows, all that a cache leaves to run (scripts/README.md). The copy is dropped when weight
    changes, and this is a plain nn.Linear then. Only changes in place through .data go unseen."""
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        self.made_of = self.weight, self.weight._version, self.weight.data_ptr()  # see forward
        self.recent = 0, 0  # how many rows the last two calls had

    def forward(self, x):
        w, (made_of, *state) = self.weight, self.made_of
        learns = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
        if self.packed is not None and (made_of is not w or state != [w._version, w.data_ptr()]):
            self.packed = None
        if self.packed is None or learns or x.dtype != w.dtype:
            return super().forward(x)
        # oneDNN makes a kernel, in half a millisecond, for every number of rows that it has not
        # seen. Decode runs another number in each step: such rows are filled up to a multiple of 8
        n, recent = x.numel() // self.in_features, self.recent
        self.recent = n, recent[0]
        if n % 8 == 0 or n in recent:
            return self.multiply(x)
        rows = torch.constant_pad_nd(x.reshape(n, -1), (0, 0, 0, -n % 8))      # (n8, in)
        return self.multiply(rows)[:n].view(*x.shape[:-1], -1)                 # (B, n, out)

    def multiply(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], None)

    def train(self, mode=True):
        if mode:
            self.packed = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):  # .to(), .cuda(), .half(), ...
        self.packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self):  # copy.deepcopy and pickle: the packed copy is opaque to both
        return {**self.__dict__, "packed": None}

def smallest_that_pays():
    """The least weights that a packed matrix has to have, as measured: any on AMD, whose products
    of few rows are slow in torch's own library; 512 x 512 on Intel; None, never, elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = f.read()
    except OSError:
        cpu = platform.processor()
    return 0 if "AuthenticAMD" in cpu else 2**18 if "GenuineIntel" in cpu else None

def pack(model):
    """Packs the linear layers of a model in eval mode, in place, where it was measured to pay and
    torch and CPU can. It does nothing if the copies would take more than 4 GB. -> the model"""
    ops, smallest = torch.ops.mkldnn, smallest_that_pays()
    can = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    if smallest is None or not can or not torch.backends.mkldnn.is_available():
        return model
    dtypes = {torch.float32}
    if hasattr(ops, "_is_mkldnn_bf16_supported") and ops._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    found = [(parent, name, layer) for parent in model.modules()
             for name, layer in parent.named_children() if type(layer) is nn.Linear
             and layer.weight.device.type == "cpu" and layer.weight.dtype in dtypes
             and layer.weight.numel() >= smallest and not layer.weight.is_inference()]
    if sum(layer.weight.nbytes for _, _, layer in found) < 2**32:
        for parent, name, layer in found:
            setattr(parent, name, PackedLinear(layer))
    return model

def autocast_pays(device):
    """Whether bfloat16 autocast makes training faster: on CUDA, and on CPUs that multiply in it."""
    cpu = torch.cpu.get_capabilities()
    return device == "cuda" or bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))

def pick_dtype(parameters, stored, device):
    """--dtype auto: float32 for small models, so that answers are the same everywhere; bfloat16
    from ten million parameters on where a CPU has AMX; from a billion on what is stored."""
    if parameters >= 1e9:
        return stored
    amx = device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16")
    return torch.bfloat16 if amx and parameters >= 1e7 else torch.float32
