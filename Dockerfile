# The serving image: app/ and what requirements.lock pins, on a slim Python. No pip, no compiler, no root, nothing to
# write to. How to run it: docs/deploy.md.
#
#   docker build --tag winnow .
#
# Both stages stand on one base, so that the venv that the first makes finds its Python in the second. A pip
# configuration (an index of your own, its certificate) comes in as a secret: --secret id=pip_conf,src=pip.conf
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements.lock requirements-build.lock ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 -m venv --without-pip /opt/winnow \
    && python3 -m pip install --quiet --require-hashes --only-binary :all: --requirement requirements-build.lock \
    && python3 -m pip --python /opt/winnow/bin/python install --quiet --require-hashes --only-binary :all: \
       --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY app app
RUN python3 -m pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir /wheels . \
    && python3 -m pip --python /opt/winnow/bin/python install --quiet --no-index --no-deps /wheels/*.whl \
    && python3 -m pip --python /opt/winnow/bin/python check

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Winnow" \
      org.opencontainers.image.description="Funnel ranking inside a latency SLA" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# What could install something more is not needed again; ensurepip would bring pip back.
RUN python3 -m pip uninstall --quiet --yes pip setuptools wheel \
    && rm -r "$(python3 -c 'import ensurepip, os; print(os.path.dirname(ensurepip.__file__))')"
COPY --from=build /opt/winnow /opt/winnow
# Both ports on every address of the container, which the service takes only with a WINNOW_API_KEYS_FILE.
ENV PATH=/opt/winnow/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    WINNOW_HOST=0.0.0.0 \
    WINNOW_PORT=8000 \
    WINNOW_ADMIN_HOST=0.0.0.0 \
    WINNOW_ADMIN_PORT=8001 \
    WINNOW_BUNDLE=/bundles/current
# Numbers, so that an orchestrator can see that it isn't root; nobody needs a name.
USER 10001:10001
WORKDIR /
# The ranking port only: what publishes all exposed ports must not publish the admin port.
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 CMD ["python", "-I", "-S", "-c", "\
import http.client, os; \
host = '::1' if ':' in os.environ['WINNOW_HOST'] else '127.0.0.1'; \
asked = http.client.HTTPConnection(host, int(os.environ['WINNOW_PORT']), timeout=2); \
asked.request('GET', '/readyz'); \
raise SystemExit(asked.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "app"]
CMD ["serve"]
