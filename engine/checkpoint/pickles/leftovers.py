"""The names in training checkpoints that are no part of a tensor, and which a pickle may ask for all the same.

What is made by them is left out: nothing is imported or called. A name is here because files that people share have
it, and because no attack is made of it anywhere; what only loads files, or finds others by their names, is not.
"""

_TRAINERS = """
argparse.Namespace
types.SimpleNamespace
copyreg._reconstructor
copy_reg._reconstructor
typing.Any
numpy.core.multiarray.scalar
numpy._core.multiarray.scalar
numpy.core.multiarray._reconstruct
numpy._core.multiarray._reconstruct
numpy.ndarray
numpy.dtype
numpy.float64
numpy.float32
numpy.int64
numpy.dtypes.Float64DType
numpy.dtypes.Float32DType
numpy.dtypes.Int64DType
numpy.dtypes.UInt32DType
_codecs.encode
collections.defaultdict
collections.Counter
collections.deque
pathlib.Path
pathlib.PosixPath
pathlib.WindowsPath
pathlib.PurePosixPath
pathlib._local.PosixPath
pathlib._local.WindowsPath
datetime.datetime
datetime.date
datetime.timedelta
torch.device
torch.serialization._get_layout
torch.torch_version.TorchVersion
pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint
pytorch_lightning.callbacks.early_stopping.EarlyStopping
pytorch_lightning.utilities.parsing.AttributeDict
lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint
lightning.pytorch.utilities.parsing.AttributeDict
lightning_fabric.utilities.data.AttributeDict
lightning.fabric.utilities.data.AttributeDict
omegaconf.dictconfig.DictConfig
omegaconf.listconfig.ListConfig
omegaconf.base.ContainerMetadata
omegaconf.base.Metadata
omegaconf.nodes.AnyNode
omegaconf.nodes.StringNode
omegaconf.nodes.IntegerNode
omegaconf.nodes.FloatNode
omegaconf.nodes.BooleanNode
easydict.EasyDict
addict.addict.Dict
transformers.training_args.TrainingArguments
transformers.training_args.OptimizerNames
transformers.trainer_utils.IntervalStrategy
transformers.trainer_utils.SchedulerType
transformers.trainer_utils.SaveStrategy
transformers.trainer_utils.HubStrategy
accelerate.state.PartialState
"""
_BUILTINS = """
set frozenset list tuple dict object int long float str unicode bool bytes bytearray complex slice range xrange
"""

LEFTOVERS = frozenset(
    [*_TRAINERS.split(), *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS.split())]
)
