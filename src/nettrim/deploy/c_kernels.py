"""The C functions that a generated file is made of, each a piece of C99 text; a file holds those that it calls."""

from __future__ import annotations

from collections.abc import Iterable

GAPS = """\
/* Where the nonzeros of a layer stand. A code of `width` bits below 2^width - 1 is the number of zeros before the next nonzero;
   2^width - 1 is that many zeros, and another code follows. The first code is in the lowest bits. */
typedef struct {
    const uint8_t *codes;
    unsigned width;
    unsigned bits;
    uint32_t held;
} gap_reader;

static uint32_t next_gap(gap_reader *reader)
{
    const uint32_t escape = ((uint32_t)1 << reader->width) - 1;
    uint32_t zeros = 0, code;
    do {
        while (reader->bits < reader->width) {
            reader->held |= (uint32_t)*reader->codes++ << reader->bits;
            reader->bits += 8;
        }
        code = reader->held & escape;
        reader->held >>= reader->width;
        reader->bits -= reader->width;
        zeros += code;
    } while (code == escape);
    return zeros;
}
"""

LINEAR_START = """\
static void start_linear(float *y, const float *bias, uint32_t outputs)
{
    uint32_t i;
    for (i = 0; i < outputs; ++i)
        y[i] = bias ? bias[i] : 0.0f;
}
"""

LINEAR_DENSE = """\
/* y = weights x + bias, weights row by row */
static void linear_dense(const float *x, float *y, const float *weights, const float *bias, uint32_t inputs, uint32_t outputs)
{
    uint32_t i, j;
    start_linear(y, bias, outputs);
    for (i = 0; i < outputs; ++i)
        for (j = 0; j < inputs; ++j)
            y[i] += *weights++ * x[j];
}
"""

LINEAR_SPARSE = """\
/* the same with `count` nonzeros */
static void linear_sparse(const float *x, float *y, const float *values, uint32_t count, const uint8_t *codes, unsigned width,
                          const float *bias, uint32_t inputs, uint32_t outputs)
{
    gap_reader reader = {NULL, 0, 0, 0};
    uint32_t k, column = 0;
    reader.codes = codes;
    reader.width = width;
    start_linear(y, bias, outputs);
    for (k = 0; k < count; ++k) {
        column += next_gap(&reader);
        while (column >= inputs) {
            column -= inputs;
            ++y;
        }
        *y += values[k] * x[column++];
    }
}
"""

WINDOW = """\
/* how a kernel moves: sizes of one channel before and after, and steps */
typedef struct {
    int32_t channels, height, width, out_channels, out_height, out_width;
    int32_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
} window;
"""

CONV_START = """\
static void start_conv(float *y, const float *bias, const window *w)
{
    const int32_t area = w->out_height * w->out_width;
    int32_t i, j;
    for (i = 0; i < w->out_channels; ++i)
        for (j = 0; j < area; ++j)
            *y++ = bias ? bias[i] : 0.0f;
}

/* adds one weight's share: the input channel x, shifted to (ky, kx) of the kernel, to the output channel y */
static void add_shifted(const float *x, float *y, float weight, int32_t ky, int32_t kx, const window *w)
{
    const int32_t left = kx * w->dilation_x - w->pad_x;
    const int32_t room = w->width - 1 - left;
    const int32_t first = left < 0 ? (w->stride_x - 1 - left) / w->stride_x : 0;
    const int32_t fitting = room < 0 ? 0 : room / w->stride_x + 1;
    const int32_t end = fitting < w->out_width ? fitting : w->out_width;
    int32_t oy, ox;
    for (oy = 0; oy < w->out_height; ++oy) {
        const int32_t iy = oy * w->stride_y + ky * w->dilation_y - w->pad_y;
        if (iy >= 0 && iy < w->height)
            for (ox = first; ox < end; ++ox)
                y[oy * w->out_width + ox] += weight * x[iy * w->width + ox * w->stride_x + left];
    }
}

/* the same for a weight by its number in its output channel `o`; `each` input channels belong to a group */
static void add_weight(const float *x, float *y, float weight, int32_t o, int32_t place, int32_t each, const window *w)
{
    const int32_t kernel = w->kernel_y * w->kernel_x;
    const int32_t groups = w->channels / each;
    const int32_t channel = o / (w->out_channels / groups) * each + place / kernel;
    add_shifted(x + channel * w->height * w->width, y + o * w->out_height * w->out_width, weight, place % kernel / w->kernel_x,
                place % w->kernel_x, w);
}
"""

CONV_DENSE = """\
static void conv_dense(const float *x, float *y, const float *weights, const float *bias, int32_t each, const window *w)
{
    const int32_t row = each * w->kernel_y * w->kernel_x;
    int32_t o, place;
    start_conv(y, bias, w);
    for (o = 0; o < w->out_channels; ++o)
        for (place = 0; place < row; ++place)
            add_weight(x, y, *weights++, o, place, each, w);
}
"""

CONV_SPARSE = """\
static void conv_sparse(const float *x, float *y, const float *values, uint32_t count, const uint8_t *codes, unsigned width,
                        const float *bias, int32_t each, const window *w)
{
    gap_reader reader = {NULL, 0, 0, 0};
    const uint32_t row = (uint32_t)(each * w->kernel_y * w->kernel_x);
    uint32_t k, place = 0;
    int32_t o = 0;
    reader.codes = codes;
    reader.width = width;
    start_conv(y, bias, w);
    for (k = 0; k < count; ++k) {
        place += next_gap(&reader);
        while (place >= row) {
            place -= row;
            ++o;
        }
        add_weight(x, y, values[k], o, (int32_t)place++, each, w);
    }
}
"""

MAX_POOL = """\
static void max_pool(const float *x, float *y, const window *w)
{
    int32_t c, oy, ox, ky, kx;
    for (c = 0; c < w->channels; ++c, x += w->height * w->width)
        for (oy = 0; oy < w->out_height; ++oy)
            for (ox = 0; ox < w->out_width; ++ox) {
                float best = -FLT_MAX;
                for (ky = 0; ky < w->kernel_y; ++ky)
                    for (kx = 0; kx < w->kernel_x; ++kx) {
                        const int32_t iy = oy * w->stride_y + ky * w->dilation_y - w->pad_y;
                        const int32_t ix = ox * w->stride_x + kx * w->dilation_x - w->pad_x;
                        if (iy >= 0 && iy < w->height && ix >= 0 && ix < w->width) {
                            const float value = x[iy * w->width + ix];
                            if (value > best || value != value) /* NaN goes on */
                                best = value;
                        }
                    }
                *y++ = best;
            }
}
"""

MEAN = """\
static float mean_of(const float *x, int32_t width, int32_t top, int32_t bottom, int32_t left, int32_t right, int32_t divisor)
{
    float sum = 0.0f;
    int32_t i, j;
    for (i = top; i < bottom; ++i)
        for (j = left; j < right; ++j)
            sum += x[i * width + j];
    return sum / (float)divisor;
}
"""

AVERAGE_POOL = """\
/* means over windows; zeros of the padding count where asked, and a divisor above 0 goes before the number of entries */
static void average_pool(const float *x, float *y, const window *w, int counts_padding, int32_t divisor)
{
    int32_t c, oy, ox;
    for (c = 0; c < w->channels; ++c, x += w->height * w->width)
        for (oy = 0; oy < w->out_height; ++oy)
            for (ox = 0; ox < w->out_width; ++ox) {
                int32_t top = oy * w->stride_y - w->pad_y, left = ox * w->stride_x - w->pad_x;
                int32_t bottom = top + w->kernel_y, right = left + w->kernel_x, entries;
                bottom = bottom < w->height + w->pad_y ? bottom : w->height + w->pad_y;
                right = right < w->width + w->pad_x ? right : w->width + w->pad_x;
                entries = (bottom - top) * (right - left);
                top = top > 0 ? top : 0;
                left = left > 0 ? left : 0;
                bottom = bottom < w->height ? bottom : w->height;
                right = right < w->width ? right : w->width;
                if (!counts_padding)
                    entries = (bottom - top) * (right - left);
                *y++ = mean_of(x, w->width, top, bottom, left, right, divisor > 0 ? divisor : entries);
            }
}
"""

ADAPTIVE_POOL = """\
/* means over windows that share out the input evenly */
static void adaptive_pool(const float *x, float *y, const window *w)
{
    int32_t c, oy, ox;
    for (c = 0; c < w->channels; ++c, x += w->height * w->width)
        for (oy = 0; oy < w->out_height; ++oy)
            for (ox = 0; ox < w->out_width; ++ox) {
                const int32_t top = oy * w->height / w->out_height, left = ox * w->width / w->out_width;
                const int32_t bottom = ((oy + 1) * w->height + w->out_height - 1) / w->out_height;
                const int32_t right = ((ox + 1) * w->width + w->out_width - 1) / w->out_width;
                *y++ = mean_of(x, w->width, top, bottom, left, right, (bottom - top) * (right - left));
            }
}
"""

CLIP_LOW = """\
static void clip_low(const float *x, float *y, uint32_t count, float low)
{
    uint32_t i;
    for (i = 0; i < count; ++i)
        y[i] = x[i] < low ? low : x[i];
}
"""

CLIP_HIGH = """\
static void clip_high(const float *x, float *y, uint32_t count, float high)
{
    uint32_t i;
    for (i = 0; i < count; ++i)
        y[i] = x[i] > high ? high : x[i];
}
"""

LEAKY = """\
static void leaky(const float *x, float *y, uint32_t count, float slope)
{
    uint32_t i;
    for (i = 0; i < count; ++i)
        y[i] = x[i] > 0.0f ? x[i] : slope * x[i];
}
"""

AFFINE = """\
/* y = scale x + shift, channel by channel */
static void affine(const float *x, float *y, const float *scale, const float *shift, uint32_t channels, uint32_t inner)
{
    uint32_t c, i;
    for (c = 0; c < channels; ++c)
        for (i = 0; i < inner; ++i)
            *y++ = scale[c] * *x++ + shift[c];
}
"""

ADD = """\
static void add(const float *a, const float *b, float *y, uint32_t count)
{
    uint32_t i;
    for (i = 0; i < count; ++i)
        y[i] = a[i] + b[i];
}
"""

COPY = """\
static void copy(const float *x, float *y, uint32_t count)
{
    uint32_t i;
    for (i = 0; i < count; ++i)
        y[i] = x[i];
}
"""

# in the order in which they stand in a file: a piece comes after those that it needs
_PIECES: dict[str, tuple[str, tuple[str, ...]]] = {
    "gaps": (GAPS, ()),
    "window": (WINDOW, ()),
    "start_linear": (LINEAR_START, ()),
    "linear_dense": (LINEAR_DENSE, ("start_linear",)),
    "linear_sparse": (LINEAR_SPARSE, ("gaps", "start_linear")),
    "start_conv": (CONV_START, ("window",)),
    "conv_dense": (CONV_DENSE, ("start_conv",)),
    "conv_sparse": (CONV_SPARSE, ("gaps", "start_conv")),
    "max_pool": (MAX_POOL, ("window",)),
    "mean": (MEAN, ()),
    "average_pool": (AVERAGE_POOL, ("window", "mean")),
    "adaptive_pool": (ADAPTIVE_POOL, ("window", "mean")),
    "clip_low": (CLIP_LOW, ()),
    "clip_high": (CLIP_HIGH, ()),
    "leaky": (LEAKY, ()),
    "affine": (AFFINE, ()),
    "add": (ADD, ()),
    "copy": (COPY, ()),
}


def pieces(called: Iterable[str]) -> list[str]:
    """The text of the functions called, and of what they need, in an order that C accepts."""
    needed: set[str] = set()
    waiting = list(called)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += _PIECES[name][1]
    return [text for name, (text, _) in _PIECES.items() if name in needed]
