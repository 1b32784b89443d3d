/* Vectors of the instruction set that a file is compiled for: this folder has a header for each.
 *
 * The files that include this are compiled once for each instruction set. Everything here has internal
 * linkage: a shared inline function would let the linker keep the copy with instructions that an older
 * processor lacks.
 */
#ifndef ATTN_SAMPLER_CPU_SIMD_SIMD_H_
#define ATTN_SAMPLER_CPU_SIMD_SIMD_H_

#define ATTN_SAMPLER_QUOTE(name) #name
#define ATTN_SAMPLER_QUOTE_EXPANDED(name) ATTN_SAMPLER_QUOTE(name)
#include ATTN_SAMPLER_QUOTE_EXPANDED(ATTN_SAMPLER_ISA.h)

#endif /* ATTN_SAMPLER_CPU_SIMD_SIMD_H_ */
