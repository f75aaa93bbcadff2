#if defined(__x86_64__)
// System headers come before the pragma: what they define inline must stay baseline code.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,prefer-vector-width=512")
#endif
#include "isa_avx512.h"
#include "table.h"

namespace fastsae {
const Kernels kernels_avx512 = FASTSAE_KERNELS(Avx512, "avx512");
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
