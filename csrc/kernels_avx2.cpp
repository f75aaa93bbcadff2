#if defined(__x86_64__)
// System headers come before the pragma: what they define inline must stay baseline code.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#endif
#include "isa_avx2.h"
#include "table.h"

namespace fastsae {
const Kernels kernels_avx2 = FASTSAE_KERNELS(Avx2, "avx2");
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
