"""What a checkpoint's JSON files say, read into one dataclass."""
import json
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch.nn import functional as F

from checkpoint.families import ARCHITECTURES, MOST_LAYERS, family_fields
from checkpoint.rope import NUMBERS, rope_frequencies
from fused.linear import weight_format

GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH,
}


@dataclass
class ModelConfig:
    """The numbers of a `config.json` under this project's names."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    max_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_norm: bool = False  # LayerNorm with bias instead of RMSNorm
    parallel: bool = False  # attention and MLP read the same x (Falcon)
    norms: int = 2  # of a layer; with one, both halves read the same normed x
    act: str = "silu"
    gated: bool = True  # w_out(act(gate) * up), else w_out(act(x))
    windows: tuple = ()  # of attention, layer by layer, in tokens; None reads everything
    names: str = "llama"  # key of checkpoint.names.NAMES
    eos: tuple = ()
    ranks: tuple = (0, 1)  # this process, and how many share the model, see checkpoint.shares
    whole: tuple = ()  # heads, KV heads and hidden channels of all processes together
    weights: tuple = None  # (bits, group size) of the layers' linear weights, None: not quantized

    @classmethod
    def from_folder(cls, folder):
        """Reads `config.json` (and `generation_config.json` when present) of a checkpoint folder.

        raises ValueError: no such file, not JSON, an unknown architecture, or an entry that is
               missing or of the wrong kind; one line that says which
        """
        check_files(folder)
        raw = read_json(Path(folder) / "config.json")
        named = raw.get("architectures")
        name = named[0] if named and isinstance(named, list) else "none named"
        if name not in list(ARCHITECTURES):  # of the list, since the name may be a list itself
            supported = ", ".join(ARCHITECTURES)
            raise ValueError(f"architecture {name} is not supported; supported: {supported}")
        try:
            config = cls(**family_fields(name, raw))
            config.check()
            config.weights = _weight_entry(raw.get("quantization_config"))
            rope_frequencies(config)  # what it misses should be known before the weights are read
        except KeyError as error:
            raise ValueError(f"{folder}/config.json lacks an entry or holds an unknown one: "
                             f"{error}") from None
        except (TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{folder}/config.json holds an entry of the wrong kind: "
                             f"{error}") from None
        config.eos = _end_tokens(Path(folder) / "generation_config.json", raw, config.vocab_size)
        return config

    def check(self):
        """Raises ValueError for numbers of no model, or a damaged config.json fails further on."""
        rope = {name: self.rope_scaling[name] for name in NUMBERS & self.rope_scaling.keys()}
        limits = {"n_layers": MOST_LAYERS, "head_dim": 65536, "norms": 3, "norm_eps": 1,
                  int: 2**31, float: 2**62}
        for name, value in {**vars(self), **rope}.items():
            kind = self.__annotations__.get(name, float)
            limit = limits.get(name, limits.get(kind))
            if limit and not (type(value) in (int, kind) and 0 < value < limit):
                raise ValueError(f"config.json: {name} must be a number ({kind.__name__}) "
                                 f"above 0 and below {limit}, got {value!r}")
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError(f"config.json: {self.n_heads} heads of {self.head_dim} channels on "
                             f"{self.n_kv_heads} KV heads cannot be divided evenly")
        windows = [window for window in self.windows if window is not None]
        wrong = any(type(window) is not int or window < 1 for window in windows)
        if wrong or len(self.windows) != self.n_layers:
            raise ValueError(f"config.json: sliding windows {self.windows[:4]} of "
                             f"{len(self.windows)} layers do not fit {self.n_layers} layers")
        if self.act not in list(ACTIVATIONS):
            supported = ", ".join(ACTIVATIONS)
            raise ValueError(f"hidden_act {self.act} is not supported; supported: {supported}")


def _weight_entry(entry):
    """(bits, group size) of a checkpoint that checkpoint/write.py wrote, None if not quantized."""
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, dict) else entry
    if method != "kivi-weights":
        raise ValueError(f"weights quantized by {method} are not supported: use the model's "
                         "original checkpoint, and --weights int8 or int4")
    bits, group_size = form = entry["bits"], entry["group_size"]
    name = f"int{bits}" if group_size is None else f"int{bits}:{group_size}"
    if weight_format(name) != form:  # "4" is no 4
        raise ValueError(f"config.json: the quantized weights are of the wrong kind: {form}")
    return form


def _end_tokens(generation_file, raw, vocab_size):
    """The tokens that end a text: of generation_config.json where it names them."""
    generation = read_json(generation_file) if generation_file.exists() else {}
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = raw.get("eos_token_id")
    eos = eos if isinstance(eos, list) else [eos] if eos is not None else []
    for token in eos:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"eos_token_id must be tokens of the {vocab_size} in the vocabulary, "
                             f"got {token!r}: correct it in config.json or {generation_file}")
    return tuple(eos)


def check_files(folder):
    """Raises ValueError where a checkpoint holds a pipe or a device: reading it may never end."""
    for file in sorted(Path(folder).glob("*")):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ValueError(f"{file} is a pipe or a device, not a file: remove it")


def read_json(path):
    """The object in a JSON file. raises ValueError: no such file, not JSON or not an object."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: "
                         "a checkpoint is a folder in the Hugging Face layout")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def layer_bits(file, n_layers):
    """(k_bits, v_bits) of every layer, from a KVTuner preset (arXiv 2502.04420) or plain text.

    A preset names each layer by its number, then `nbits_key` and `nbits_value`; plain text has
    one line "K-bits V-bits" a layer.
    raises ValueError: unreadable, or not exactly one pair a layer
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    # Short numbers, and blanks of one line: the time must not grow with the square of the text.
    number = r"\b(\d{1,9})"
    preset = re.findall(rf"{number}\W+nbits_key\W+{number}\W+nbits_value\W+{number}\b", text)
    plain = re.findall(rf"(?m)^[ \t]*{number}[ \t,]+{number}[ \t]*$", text)
    found = preset or [(layer, *pair) for layer, pair in enumerate(plain)]
    bits = sorted(tuple(int(number) for number in line) for line in found)  # by layer
    if [layer for layer, _, _ in bits] != list(range(n_layers)):
        raise ValueError(f"{file} gives bits for {len(bits)} layers, the model has {n_layers} "
                         "(one pair each, numbered from 0)")
    return [(k_bits, v_bits) for _, k_bits, v_bits in bits]
