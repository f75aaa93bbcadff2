#if defined(__x86_64__)
// System headers come before the pragma: what they define inline must stay baseline code.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                    \
    __attribute__((                                                                              \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,"     \
               "avx2,fma,f16c,bmi,bmi2,popcnt"))),                                               \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,avx2,fma,f16c," \
    "bmi,bmi2,popcnt,prefer-vector-width=512")
#endif
#include "isa_amx.h"
#include "table.h"

namespace fastsae {
const Kernels kernels_amx = FASTSAE_KERNELS(Amx, "amx");
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
