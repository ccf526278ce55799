// Lays a 3x3x3 convolution's weights out for `conv3d.cu`.
//
// Constants: KIND, type of the packed ones; WEIGHT, type of those given.

#define TAPS 27

// To [tap][plane of 8 inputs][output][8 inputs], with zeros where there are no inputs.
extern "C" __global__ void pack_weights(const WEIGHT *weight, element *packed, int inputs,
                                        int planes, int outputs, int input_stride,
                                        int output_stride, int tap_stride, int flip) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= TAPS * planes * outputs * 8) return;
    int output = i / 8 % outputs, plane = i / (8 * outputs) % planes;
    int tap = i / (8 * outputs * planes), input = plane * 8 + i % 8;
    int from = input * input_stride + output * output_stride +
               (flip ? TAPS - 1 - tap : tap) * tap_stride;
    packed[i] = from_float(input < inputs ? to_float(weight[from]) : 0.0f);
}
