/* The interface of each family of kernels. */
#ifndef TRTLLM_KERNELS_FAMILIES_H
#define TRTLLM_KERNELS_FAMILIES_H

#include "weight_only.h"
#include "w8a8.h"
#include "fmha.h"
#include "mmha.h"
#include "decode_layer.h"
#include "pointwise.h"
#include "sampling.h"

#endif
