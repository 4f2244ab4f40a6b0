// Philox4x32-10: random words by sample, the same ones as dpnn/philox.py draws (tests/test_philox.py compares them).
//
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A round takes the counter (c0, c1, c2, c3) and
// the key (k0, k1) to
//     (high(m1 c2) ^ c1 ^ k0, low(m1 c2), high(m0 c0) ^ c3 ^ k1, low(m0 c0)),   m0 = D2511F53, m1 = CD9E8D57,
// and the key to (k0 + 9E3779B9, k1 + BB67AE85); ten rounds make four words of 32 bits.
//
// Shapes: the words of a sample are w[i], i = 0, 1, ...; word i is word i % 4 of the counter (i / 4, id's low half, id's
// high half, epoch) with the key (seed, crc32 of the purpose). A thread that needs four neighbours makes one call.
// It includes nothing, so NVRTC takes it as it is, and a plain C++ compiler as well.
#pragma once

#ifdef __CUDACC__
#define DPNN_PHILOX __host__ __device__ __forceinline__
#else
#define DPNN_PHILOX inline
#endif

namespace dpnn {

struct Words {
    unsigned int w[4];
};

// The four words at the counter c with the key (k0, k1).
DPNN_PHILOX Words philox4x32(Words c, unsigned int k0, unsigned int k1) {
    for (int round = 0; round < 10; ++round) {
        const unsigned long long p0 = 0xD2511F53ull * c.w[0];
        const unsigned long long p1 = 0xCD9E8D57ull * c.w[2];
        c = Words{{(unsigned int)(p1 >> 32) ^ c.w[1] ^ k0, (unsigned int)p1,
                   (unsigned int)(p0 >> 32) ^ c.w[3] ^ k1, (unsigned int)p0}};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// The words [4 block, 4 block + 4) of a sample; `purpose` is the crc32 of the purpose's name.
DPNN_PHILOX Words by_sample(unsigned int seed, unsigned int epoch, unsigned int purpose, unsigned long long id,
                            unsigned int block) {
    return philox4x32(Words{{block, (unsigned int)id, (unsigned int)(id >> 32), epoch}}, seed, purpose);
}

}  // namespace dpnn
