// Fills a kernel table for one instruction set; included by kernels_<isa>.cpp after its target
// pragma.
#pragma once
#include "encode.h"
#include "mi.h"
#include "mi_product.h"
#include "residual.h"
#include "sparse_outer.h"
#include "steer.h"
#include "train.h"
#include "watch.h"

#define FASTSAE_KERNELS(I, name) \
  {name,                         \
   topk_rows<I>,                 \
   decode_rows<I>,               \
   decode_sort<I>,               \
   decode_blocks<I>,             \
   gather_dot_rows<I>,           \
   sparse_outer_features<I>,     \
   code_gradients<I>,            \
   train_features<I>,            \
   adam_vector<I>,               \
   centre_rows<I>,               \
   copy_rows<I>,                 \
   encode_scan<I>,               \
   encode_plan<I>,               \
   encode_rescore<I>,            \
   encode_write<I>,              \
   I::kTiles,                    \
   steer_rows<I>,                \
   residual_take<I>,             \
   residual_put<I>,              \
   watch_rows<I>,                \
   mi_split<I>,                  \
   mi_product<I>,                \
   mi_columns<I>,                \
   mi_rows<I>}
