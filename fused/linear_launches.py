"""How PyTorch's compiler shall run the linear layers of fused/linear.py on CUDA.

The layer's arithmetic is in its own file. Here is which of Inductor's kernels may become one, and
with how many threads those that read packed words are launched.
"""
import torch

from fused.attention import is_product, products_may_fuse
from fused.linear import few, tile_rows

# Inductor's options for the small kernels between products: those that need nothing of each other
# are one launch, and each starts while the one before it ends. Without, a layer of one row takes
# 5 us more.
SMALL = {"combo_kernels": True, "triton.enable_pdl": True}
# Launches: the fastest of those timed on an H200, see results/weights-forms.md. One row of x:
SUMS = {"XBLOCK": 4, "R0_BLOCK": 128, "num_warps": 1, "num_stages": 1}
# More rows, by bits and rows of a tile (XBLOCK; YBLOCK are outputs). A warp has 16 outputs: with
# more, the weights go through shared memory one by one.
PRODUCT_LAUNCH = ("YBLOCK", "R0_BLOCK", "num_warps", "num_stages")
PRODUCTS = {
    (8, 8): (32, 64, 2, 3),
    (8, 16): (32, 32, 2, 3),
    (8, 32): (64, 64, 4, 3),
    (8, 64): (64, 32, 4, 4),
    (8, 128): (64, 32, 4, 3),
    (4, 8): (32, 64, 2, 3),
    (4, 16): (32, 32, 2, 3),
    (4, 32): (64, 32, 4, 3),
    (4, 64): (64, 32, 4, 3),
    (4, 128): (64, 32, 4, 3),
}


def compiled_weights(fn, joined=True):
    """`fn`, compiled so that a QuantizedLinear's packed words are read where they are multiplied.

    joined  small kernels that do not depend on each other are one launch: not where two such
            layers do not, which would lose their own launches
    """
    from torch._inductor.virtualized import V

    limits = ("realize_opcount_threshold", "realize_reads_threshold",
              "realize_acc_reads_threshold", "max_fusion_size")
    # Without, Inductor stores parts of so long an expression, in kernels of their own.
    options = SMALL | dict.fromkeys(limits, 2048) | {
        "combo_kernels": joined,
        "inductor_choices_class": weight_launches,
        "triton.native_matmul": True,
        "shape_padding": False,
        # Without these two the parts of a sum lie innermost, and are added up in another kernel.
        "loop_ordering_after_fusion": False,
        "pick_loop_orders": False,
    }
    packed = torch.compile(fn, fullgraph=True, dynamic=False, options=options)
    written_out = torch.compile(fn, fullgraph=True, dynamic=False, options=SMALL)
    choices = weight_launches()

    def call(*args):
        x = next(arg for arg in args if torch.is_tensor(arg))
        with V.set_choices_handler(choices):  # attention, compiled in between, has its own
            return (packed if few(x) else written_out)(*args)

    return call


def weight_launches():
    """Inductor's choices for `compiled_weights`: its own, but for what stands below."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.codegen.triton import FixedTritonConfig

    class WeightLaunches(InductorChoices):
        @staticmethod
        def can_fuse(scheduler, node1, node2, shared_data_score):
            # What turns columns into rows is a kernel of its own, of 2 us. Without, inside that of
            # a norm or a sum, one program a row reads single numbers: 11 to 60 us at 16 rows.
            for node, other in ((node1, node2), (node2, node1)):
                if node.is_reduction() and not is_product(node) and _turns(other):
                    return False
            return products_may_fuse(scheduler, node1, node2, shared_data_score)

        def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
            launch = _launch(features, groups[0])
            if launch is None:
                return kernel_kwargs
            return {**kernel_kwargs, "fixed_config": FixedTritonConfig(launch)}

        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction):
            return not _reads_packed(features) and InductorChoices.should_use_persistent_reduction(
                features, cooperative_reduction)

        @staticmethod
        def reduction_split_factor(device, reduction_numel, numel, inner_reduction):
            return 1  # without, a norm becomes two kernels

        def uuid(self):
            # Part of the key of the compile caches.
            return f"kivi-weights-9 {SUMS} {PRODUCTS}"

    return WeightLaunches()


def _launch(features, sizes):
    """The fixed launch of a kernel whose axes have these sizes, None to let Inductor choose."""
    if not _reads_packed(features):
        if "y" in sizes and any(map(_turns, features.scheduler_nodes())):
            # Without, Inductor chose a launch that takes 12.6 us instead of 3.
            rows = min(32, tile_rows(int(sizes["y"])))
            return {"YBLOCK": rows, "XBLOCK": 1024 // rows, "num_warps": 4, "num_stages": 1}
        return None
    if "y" not in sizes:  # a sum: its outputs are in x
        return dict(SUMS)
    rows = tile_rows(int(sizes["x"]))
    launch = {"XBLOCK": rows}
    if "z" in sizes:
        launch["ZBLOCK"] = 1
    return launch | dict(zip(PRODUCT_LAUNCH, PRODUCTS[_bits(features, sizes), rows]))


def _bits(features, sizes):
    """Bits of the weights of a product: with 8, an output has one pair of scale and zero."""
    from torch._inductor.virtualized import V

    for name in _reads(features.scheduler_nodes()):
        if V.graph.get_dtype(name) == torch.int32 and V.graph.get_numel(name) == sizes["y"]:
            return 8
    return 4


def _reads_packed(features):
    """Is a kernel a reduction over an int32 tensor from outside?

    The pairs of scale and zero are int32, too, but views, made inside.
    """
    from torch._inductor.virtualized import V

    reductions = [node for node in features.scheduler_nodes() if node.is_reduction()]
    outside = [name for name in _reads(reductions) if name in V.graph.graph_inputs]
    return any(V.graph.get_dtype(name) == torch.int32 for name in outside)


def _reads(nodes):
    """The names of all that nodes of Inductor's scheduler read."""
    return {dep.name for node in nodes for dep in node.read_writes.reads}


def _sources(node):
    """The nodes of Inductor's scheduler whose results `node` reads."""
    buffers = [node.scheduler.name_to_buf.get(dep.name) for dep in node.read_writes.reads]
    return [b.defining_op for b in buffers if b is not None and b.defining_op is not None]


def _turns(node):
    """Does it read what products leave, columns, and so make rows of them?"""
    for source in _sources(node):
        if is_product(source) or any(map(is_product, _sources(source))):
            return True
    return False
