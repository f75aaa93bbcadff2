#include "isa_scalar.h"
#include "table.h"

namespace fastsae {
const Kernels kernels_scalar = FASTSAE_KERNELS(Scalar, "scalar");
}
