"""The formats of quantised weights: values and scales as one. Imported only where a model may hold any of it."""

from mergemill.engine.offers.bitsandbytes import offer_bitsandbytes
from mergemill.engine.offers.fp4 import offer_fp4
from mergemill.engine.offers.gguf import offer_gguf
from mergemill.engine.offers.gptq import offer_gptq
from mergemill.engine.offers.mxfp4 import offer_mxfp4
from mergemill.engine.offers.offer import Format
from mergemill.engine.offers.packed import offer_packed
from mergemill.engine.offers.scaled import offer_scaled

QUANTIZED: tuple[Format, ...] = (
    offer_gguf,
    offer_bitsandbytes,
    offer_gptq,
    offer_packed,
    offer_mxfp4,
    offer_fp4,
    offer_scaled,
)
