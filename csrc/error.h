/* What goes wrong below the C API, with its status and a message formatted as by printf. */
#ifndef ATTN_SAMPLER_ERROR_H_
#define ATTN_SAMPLER_ERROR_H_

#include <cstdarg>
#include <cstdio>
#include <exception>

#include "attn_sampler.h"

namespace attn_sampler {

class Error : public std::exception {
  public:
    __attribute__((format(printf, 3, 4))) Error(attn_sampler_status status, const char *format, ...)
        : status_(status) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(message_, sizeof(message_), format, arguments);
        va_end(arguments);
    }
    attn_sampler_status status() const { return status_; }
    const char *what() const noexcept override { return message_; }

  private:
    attn_sampler_status status_;
    char message_[512];
};

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_ERROR_H_ */
