// What the bindings call: one table of functions per instruction set, arguments as raw pointers.
// All matrices are row-major and contiguous; sizes are in elements.
//
// The kernels are templates over an instruction-set class (isa_*.h), compiled once per class in
// kernels_<isa>.cpp under that target. Everything they use lives in anonymous namespaces, and they
// instantiate nothing from std::, because the linker keeps one copy of a shared inline function: it
// could be the AVX-512 one, for machines without it.
#pragma once
#include <stddef.h>
#include <stdlib.h>

#include "types.h"

namespace fastsae {

struct TopkArgs {
  const void* x;  // [N, F] of dtype
  DType dtype;
  int64_t F, k;
  void* values;      // [N, k] of dtype
  int32_t* indices;  // [N, k]
};

struct DecodeArgs {
  const void* values;  // [N, K] of value_type
  const int32_t* indices;
  const void* W;      // [F, D] of weight_type
  const float* bias;  // [D] or null
  void* out;          // [N, D] of out_type
  DType value_type, weight_type, out_type;
  int64_t N, K, D;
  int64_t F, slices;  // decode_rows: work item i is columns of slice i / N of row i % N
  // decode_blocks, of slices of kDecodeColumns columns, after decode_sort has filled these:
  float* sorted_values;                 // [N, K]: entries of a row by ascending index, of which
  int32_t *sorted_indices, *counts;     // counts [N] are not zero
  int64_t block_rows, block_features;   // of a work item; of the weights that it reads at a time
  char* scratch;  // of one thread: a block of weights, block_rows sums of kDecodeColumns + 1 words
};

constexpr int64_t kDecodeColumns = 64;

struct GatherDotArgs {
  const void* g;  // [N, D] of g_type
  const void* W;  // [F, D] of weight_type
  const int32_t* indices;
  float* out;  // [N, K]
  DType g_type, weight_type;
  int64_t K, D;
};

struct SparseOuterArgs {
  const float* values;     // sorted by feature, then row: value and row of every entry
  const int32_t* rows;     //
  const int64_t* offsets;  // [F + 1] into the two
  const void* g;           // [N, D] of g_type
  float* dW;               // [F, D]
  float* db;               // [F]
  DType g_type;
  int64_t D;
  int64_t column_begin, column_end;  // columns of dW to write; db is written with column 0
};

struct AdamArgs {
  float beta1, beta2, eps;
  float step;  // lr / (1 - beta1^t)
  float root;  // 1 / sqrt(1 - beta2^t)
};

struct CodeArgs {
  const float* values;     // sorted by feature, then row: value, its gradient and row of every
  float* slopes;           // entry; the gradient is computed (all 0 before)
  const int32_t* rows;     //
  const int64_t* offsets;  // [F + 1] into the three
  const float* g;          // [N, D]: gradient of the reconstruction
  const float* x;          // [N, D]: what the encoder multiplies
  int64_t N, D;
};

struct CodeGradientArgs {
  CodeArgs code;
  const float* W;  // [F, D], decoder
  float *dW_dec, *dW_enc, *db_enc;
};

struct TrainArgs {
  CodeArgs code;
  const int32_t* extra_slot;  // [F]: row of the extra gradients, or -1; null without any
  const float *extra_dec, *extra_enc, *extra_bias;
  float *W_enc[3], *b_enc[3], *W_dec[3];  // parameter, first and second moment
  AdamArgs adam;
};

struct CentreArgs {
  const void* x;        // [N, D] of x_type
  const float* b_dec;   // [D] or null
  const float* centre;  // [D] or null: the screen is taken about it
  double centre_norm;
  float* centred;  // [N, D]: x - b_dec, rows `stride` apart
  int64_t stride;
  bf16* tiles;     // centred - centre in bf16, tiles of 16 rows x 32 columns, or null
  int16_t* words;  // centred - centre in int16 with word_scale [N], rows padded to 128, or null
  float* word_scale;
  bool floats;     // the screen multiplies `centred` itself, see product.h
  float* bounds;   // [N, 2]: factors of |w| and |w - w~| in the screen's error, see screen.h
  DType x_type;
  int64_t D;
};

// A copy of the weights that screens read: tiles of bf16, or bytes with a scale per 128.
struct CopyArgs {
  const void* W;  // [F, D] of weight_type
  DType weight_type;
  const float* centre;  // [D]
  int64_t F, D;
  bf16* tiles;    // [F / 16 up][D / 32 up][16 pairs][16 columns][2], or null
  int8_t* bytes;  // [F, D up to 128], or null
  float* scales;  // [F, D up to 128 / 128]
  float *norms, *errors, *products;  // [F]: |w|, |w - w~| (rounded up), <centre, w>
};

struct Tally {
  int32_t count, limit, todo;  // entries; how many before the list is compacted; to be rescored
  float floor;
};

struct EncodeArgs {
  const void* W;  // [F, D] of weight_type
  DType weight_type;
  const float* b_enc;      // [F]
  const float* threshold;  // [F], encode_threshold only
  int64_t N, F, D, k;
  const float* centred;  // [N, D], rows `stride` apart
  int64_t stride;
  // Of the screen; without floats, tiles and words, values are exact throughout.
  bool floats;           // panels are packed as they come; 12 more rows of `centred` exist
  const bf16* tiles;     // of CentreArgs, whole blocks of 32 rows
  const int16_t* words;  // of CentreArgs, with room for three more rows
  const float* word_scale;
  const float* bounds;      // [N, 2]
  const float* centre;      // [D] or null
  const bf16* weight_tiles;  // the rest of CopyArgs; null where panels are rounded as they come
  const int8_t* bytes;
  const float *scales, *norms, *errors, *products;
  uint8_t* stale;  // set where a value lies outside its bound: the copy is not of these weights
  // Candidates, see candidates.h: lists of `capacity` entries, `ranges` of them for every row.
  // Work item i of scan and rescore is range i % ranges of the i / ranges-th of `groups` of rows.
  int64_t ranges, groups, capacity;
  int64_t panel;  // features scanned at a time: a multiple of 32, at most 256
  int32_t *index, *todo;
  float *h, *error;
  Tally* tally;            // [N, ranges]
  uint8_t* left;           // [N], set where a row has more candidates than its lists hold
  const int64_t* rows;     // row -> output row
  float* values;           // topk: [., k]
  int32_t* indices;        // topk: [., k]
  int32_t** entries;       // threshold: output row -> malloc'ed count indices, then value bits
  int64_t* counts;         // threshold: output row -> count
};

struct SteerTableArgs {
  const float *enc, *bias, *theta, *dec;
  const int32_t *op_kind, *op_begin, *op_end;
  const float* op_scalar;
  const int32_t* item_row;
  const float* item_value;
  const int32_t *gate_begin, *gate_end;
  const float* gate_above;
  const int32_t* norm_preserve;
  int64_t R, S, P, items;
};

struct SteerArgs {
  const void* x;  // [N, D] of x_type
  const int32_t* slots;
  const float* strengths;
  void* out;  // [N, D] of x_type
  DType x_type;
  int64_t D;
  SteerTableArgs table;
};

struct ResidualArgs {
  void *hidden, *residual;  // [N, D]; residual may be null
  DType type;               // of all
  const int64_t* index;     // rows of them
  void* x;                  // one of each index
  const void* y;
  int64_t D;
};

struct WatchArgs {
  const void *x, *r;  // [N, D]
  DType type;
  const int32_t* slots;  // [N]
  const float *enc, *bias, *floor, *gate, *above;
  const int32_t* count;  // [S] features of a slot
  int64_t D, J;
  double* values;  // [N, 4 + J]
};

// Rows of a matrix in tiles of `parts` bf16 that add up to the values (parts = 1: they are bf16).
struct MiSplitArgs {
  const void* x;  // [N, D] of type
  DType type;
  int64_t N, D, parts;
  bool columns;  // pairs across 16 rows, as the right operand of a product has them
  bf16* tiles;   // [N / 16, even][D / 32 up][parts][16][32], or [16 pairs][16 columns][2]
};

struct MiProductArgs {
  const bf16 *features, *words;  // of MiSplitArgs
  int64_t n, V, D, parts;
  float* logits;     // [n, V], or null where only the sums are wanted
  float scale;       // the rest: see MiArgs; null where only the logits are wanted
  float* column_max;
  float* column_sum;
};

constexpr int64_t kMiWords = 128;

enum class Objective : int32_t { mi = 0, pmi = 1, paper = 2, logit = 3 };

struct MiArgs {
  const float* logits;  // [n, V], one chunk of features
  int64_t n, V;
  float scale;              // 1 / temperature
  float* column_max;        // [V] running maximum of scale * logits
  float* column_sum;        // [V] running sum of exp(scale * logits - column_max)
  const float* column_lse;  // [V]
  Objective objective;
  float log_features;  // log F
  int64_t top;
  float* scores;     // [n, top]
  int32_t* indices;  // [n, top]
};

struct Kernels {
  const char* name;
  void (*topk_rows)(const TopkArgs&, int64_t begin, int64_t end);
  void (*decode_rows)(const DecodeArgs&, int64_t begin, int64_t end);
  void (*decode_sort)(const DecodeArgs&, int64_t begin, int64_t end);
  void (*decode_blocks)(const DecodeArgs&, int64_t begin, int64_t end);
  void (*gather_dot_rows)(const GatherDotArgs&, int64_t begin, int64_t end);
  void (*sparse_outer_features)(const SparseOuterArgs&, int64_t begin, int64_t end);
  void (*code_gradients)(const CodeGradientArgs&, int64_t begin, int64_t end);
  void (*train_features)(const TrainArgs&, float* shift, int64_t begin, int64_t end);
  void (*adam_vector)(const AdamArgs&, const float* grad, float* const* state, int64_t n);
  void (*centre_rows)(const CentreArgs&, int64_t begin, int64_t end);
  void (*copy_rows)(const CopyArgs&, int64_t begin, int64_t end);  // multiples of 16
  void (*encode_scan)(const EncodeArgs&, int64_t begin, int64_t end);              // items
  void (*encode_plan)(const EncodeArgs&, int64_t begin, int64_t end, bool first);  // rows
  void (*encode_rescore)(const EncodeArgs&, int64_t begin, int64_t end);           // items
  void (*encode_write)(const EncodeArgs&, int64_t begin, int64_t end);             // rows
  bool tiles;  // encode_scan can screen
  void (*steer_rows)(const SteerArgs&, int64_t begin, int64_t end);
  void (*residual_take)(const ResidualArgs&, int64_t begin, int64_t end);
  void (*residual_put)(const ResidualArgs&, int64_t begin, int64_t end);
  void (*watch_rows)(const WatchArgs&, int64_t begin, int64_t end);
  void (*mi_split)(const MiSplitArgs&, int64_t begin, int64_t end);      // blocks of 16 rows
  void (*mi_product)(const MiProductArgs&, int64_t begin, int64_t end);  // blocks of kMiWords words
  void (*mi_columns)(const MiArgs&, int64_t begin, int64_t end);
  void (*mi_rows)(const MiArgs&, int64_t begin, int64_t end);
};

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_amx;
#endif

const Kernels& kernels();  // the table in use
bool use_isa(
    const char* name);  // "scalar" | "avx2" | "avx512" | "amx" | "auto"; false: not on this machine
[[noreturn]] void out_of_memory();  // throws std::bad_alloc from baseline code

namespace {

// A 64-byte aligned buffer for the length of a scope.
struct Memory {
  char* data;
  explicit Memory(int64_t bytes)
      : data((char*)aligned_alloc(64, (size_t)((bytes + 127) / 64 * 64))) {
    if (!data) out_of_memory();
  }
  ~Memory() { free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

}  // namespace
}  // namespace fastsae
